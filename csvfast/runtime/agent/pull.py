"""PullImage: registry, broker, decryption and unpacking, in the agent's own memory.

What the policy says about an image is asked twice: about its name before anything is fetched, about its manifest and layers
before any key is. Thread-safety: any thread; one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csvfast.errors import ContainerError, CsvfastError
from csvfast.runtime.agent.timings import StepTimes

if TYPE_CHECKING:
    from csvfast.image.assemble import AssembledImage
    from csvfast.image.descriptor import Descriptor
    from csvfast.image.image_config import ImageConfiguration
    from csvfast.image.manifest import Manifest
    from csvfast.image.tree import ContentStore
    from csvfast.ratstls.attester import Attester
    from csvfast.runtime.agent.configuration import AgentConfiguration

__all__ = ["PulledImage", "pull_image"]


@dataclass
class PulledImage:
    """An image in the agent's memory. `taken`: its tree has become a container's."""

    name: str
    rootfs: Path
    manifest: str
    config: ImageConfiguration
    encrypted: tuple[bool, ...]
    notes: tuple[str, ...] = ()
    taken: bool = field(default=False)


def pull_image(
    name: str,
    source: str,
    destination: Path,
    *,
    configuration: AgentConfiguration,
    attester: Attester,
    times: StepTimes,
    content: ContentStore | None = None,
    owners: bool | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PulledImage:
    """Fetches an image and makes its root file system at `destination`.

    In: name     as the policy knows it. source: where it is fetched from
    Raises: ContainerError: "policy", "attestation", "broker", "image", each with the layer or file concerned.
    """
    from csvfast.image.assemble import assemble_image
    from csvfast.image.descriptor import is_encrypted
    from csvfast.runtime.agent.doors import Door

    policy = configuration.policy
    policy.check_image(name)

    def approve(descriptor: Descriptor, manifest: Manifest, _config: ImageConfiguration) -> None:
        clear = sum(not is_encrypted(layer.media_type) for layer in manifest.layers)
        policy.check_manifest(descriptor.digest, clear)

    try:
        with closing(_open(source, configuration)) as blobs, Door(configuration, attester, times.add) as door:
            wanted = _wanted(source)
            image: AssembledImage = assemble_image(
                blobs, wanted, destination, unwrap=door.unwrap, approve=approve, owners=owners, content=content,
                limits=_limits(configuration), timings=times.add, progress=progress,
            )  # fmt: skip
    except ContainerError:
        raise
    except (CsvfastError, OSError) as problem:
        raise ContainerError("image", f"{name}: {problem}") from problem
    return PulledImage(name, image.rootfs, image.descriptor.digest, image.config, image.encrypted, image.notes)


def _open(source: str, configuration: AgentConfiguration) -> Any:
    from csvfast.image.reference import parse_reference
    from csvfast.image.registry import RegistryClient

    reference = parse_reference(source)
    if reference.host is None:
        raise ContainerError("image", f"{source[:200]!r}: expected an image in a registry")
    return RegistryClient(reference, plain_http=configuration.plain_http(reference.host), credentials=None)


def _wanted(source: str) -> str | None:
    from csvfast.image.reference import parse_reference

    return parse_reference(source).wanted


def _limits(configuration: AgentConfiguration) -> Any:
    from csvfast.image.limits import DEFAULT_LIMITS, Limits

    given = configuration.limits
    return Limits(
        total_bytes=given.get("image_bytes", DEFAULT_LIMITS.total_bytes), entries=given.get("entries", DEFAULT_LIMITS.entries)
    )
