"""info(), force_kernel() and get_include()."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import csvfast


def test_info_is_json_and_says_what_runs():
    info = csvfast.info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == csvfast.__version__
    assert set(info["kernels"]) == {"sm4", "sm3", "sm3-many", "ghash", "sm2", "sm2-many"}
    for kernels in info["kernels"].values():
        assert kernels["compiled"][-1] == "portable", "the last resort is always there"
        assert "portable" in kernels["available"]
        assert kernels["chosen"] in kernels["available"]
        assert set(kernels["available"]) <= set(kernels["compiled"])
        # Names later tools look for.
        for name in kernels["compiled"]:
            assert any(word in name for word in ("portable", "aesni", "gfni", "avx2", "avx512", "pclmul", "adx"))
    assert info["cpu"]["count"] >= 1
    assert info["cpu"]["model"]


def test_choice_is_the_most_preferred_available_one():
    for primitive, kernels in csvfast.info()["kernels"].items():
        csvfast.force_kernel(primitive, None)
        assert csvfast.info()["kernels"][primitive]["chosen"] == kernels["available"][0]


@pytest.mark.parametrize("primitive", ["sm4", "sm3", "sm3-many", "ghash", "sm2", "sm2-many"])
def test_every_available_kernel_can_be_forced(primitive):
    automatic = csvfast.info()["kernels"][primitive]
    try:
        for name in automatic["compiled"]:
            if name in automatic["available"]:
                csvfast.force_kernel(primitive, name)
                assert csvfast.info()["kernels"][primitive]["chosen"] == name
            else:
                with pytest.raises(csvfast.errors.KernelError):
                    csvfast.force_kernel(primitive, name)
    finally:
        csvfast.force_kernel(primitive, None)
    assert csvfast.info()["kernels"][primitive] == automatic


def test_include_holds_the_header():
    assert "csvf_xts_encrypt" in (Path(csvfast.get_include()) / "csvfast.h").read_text(encoding="utf-8")


def test_unknown_library_is_named():
    with pytest.raises(ValueError, match="unknown library 'openssl': expected one of 'csvfast', 'vmram-preload'"):
        csvfast.get_library("openssl")


def test_documented_example():
    import doctest

    failed, tried = doctest.testmod(csvfast)
    assert (failed, tried > 0) == (0, True)
