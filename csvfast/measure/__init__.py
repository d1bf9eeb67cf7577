"""Measurement: digests of images, dm-verity, and the launch digest of a guest that does not exist yet.

    measure_image      linear SM3 or page tree of a file, block device, pipe or standard input
    measure_images     many of them, several at a time
    batch, Job         thousands of them: lanes, all cores or machines, a ledger that survives kills
    format_verity      dm-verity with SM3, as `veritysetup format --hash=sm3`
    verify_verity      as `veritysetup verify`
    launch_digest      SM3 of firmware, hash table and, on request, VMSAs

Everything streams: memory stays bounded whatever the size of the input.
"""

from __future__ import annotations

from csvfast.measure.errors import (
    EmptySourceError,
    FirmwareTableError,
    FormatError,
    HashTableAreaError,
    MeasureError,
    ParameterError,
    RecipeError,
    ResetBlockError,
    SourceChangedError,
    SourceError,
    SourceKindError,
    SourceNotFoundError,
    SourceTruncatedError,
    SourceUnreadableError,
    SuperblockError,
    TargetError,
)
from csvfast.measure.fleet.discover import Selection
from csvfast.measure.fleet.executors import Executor, ProcessExecutor, ThreadExecutor
from csvfast.measure.fleet.job import Job, JobProgress, batch
from csvfast.measure.fleet.rows import Identity, Item, Options, Row
from csvfast.measure.image import Measurement, measure_image
from csvfast.measure.images import measure_images
from csvfast.measure.launch import HashedInput, LaunchDigest, LaunchPiece, hash_table, launch_digest
from csvfast.measure.ovmf import GuidTable, HashTableArea, parse_guid_table
from csvfast.measure.recipe import (
    Difference,
    LaunchRecipe,
    compare_explanations,
    load_explanation,
    load_recipe,
)
from csvfast.measure.superblock import VerityParameters, pack_superblock, parse_superblock
from csvfast.measure.verity import VerityCheck, VerityRecord, format_verity, read_superblock, verify_verity
from csvfast.measure.vmsa import vmsa_page

__all__ = [
    "Difference",
    "EmptySourceError",
    "Executor",
    "FirmwareTableError",
    "FormatError",
    "GuidTable",
    "HashTableArea",
    "HashTableAreaError",
    "HashedInput",
    "Identity",
    "Item",
    "Job",
    "JobProgress",
    "LaunchDigest",
    "LaunchPiece",
    "LaunchRecipe",
    "MeasureError",
    "Measurement",
    "Options",
    "ParameterError",
    "ProcessExecutor",
    "RecipeError",
    "ResetBlockError",
    "Row",
    "Selection",
    "SourceChangedError",
    "SourceError",
    "SourceKindError",
    "SourceNotFoundError",
    "SourceTruncatedError",
    "SourceUnreadableError",
    "SuperblockError",
    "TargetError",
    "ThreadExecutor",
    "VerityCheck",
    "VerityParameters",
    "VerityRecord",
    "batch",
    "compare_explanations",
    "format_verity",
    "hash_table",
    "launch_digest",
    "load_explanation",
    "load_recipe",
    "measure_image",
    "measure_images",
    "pack_superblock",
    "parse_guid_table",
    "parse_superblock",
    "read_superblock",
    "verify_verity",
    "vmsa_page",
]
