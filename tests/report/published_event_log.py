"""The CSV event log that trustee publishes (confidential-containers/trustee, Apache-2.0: deps/eventlog/test_data/CCEL_data_csv
and its parsed form CCEL_data_csv_out.json): register and SM3 digest of its 82 events in order, the data of a few, and the
register values."""

from __future__ import annotations

import base64
from typing import Any

SEQUENCE = [
    (
        1,
        """b4ca5cb300a44b541cf7978203bc2d769622e695dc18549bd23b8378fcdef522
        205702258aeaecaf68533e90c2c6cb17cdc1bc34f5c99e0564bb57f5ed3a0e27
        97f842cf8be3ef0c9b1e5fb6d4ab4af26b2943e5ce349883afdf607e81707f7a
        f78247933758602a0e2ba38cdc7efb4b55d4a17f9aec21df6af56d6c7389bb05
        e77ef9cdb81c85e0f9b1a19f7859b762b7b6baafbf4a195eca0b868fa20f8df2
        afcc870fa20c507995499794371e8c25e3a7310fa72200c109379973ae236845
        b76edb1b065435857489ac389d72a180b7cd85992c048b1f1ef6c05865758a0d
        ef29c5aedd2c44c5539604b592b2c403707763173127cc6ec9ab80d8302df4ce
        b41ee000e9c4730cba3825f0bc40d14b8cbd155675ff438ddc9c9d62b4a30d62
        c3116e37611507bb0a8959327527f6c96523c4479070be2b5d0aece22404e784
        d0f560980d8a22bc2d5848fa292fc3a5410d012e6a7b1cf6f3f7e1b63deec287
        1a475ffdd6693e3e15f44c0a84a4f4d7017a6a5188b6bfe24431d29ccaa63c59
        226fa299aea858090c944ed8d35d035b627353f1d44ace4e99d5b7d6a1226949
        e5431d01e74fba877bf7c79291b03372e5fbd0f1bda902c8e208b09366b48a08
        5b015e9c8f019c89be7d4dda7e36f952fbb2cad0bffeb07cc6f301eaed3a3922
        faf30d2e01b7cb766ccaf2c4b001ed8102a34697671834109ac007b70136c260""",
    ),
    (
        2,
        """0c45a5c3c304d73f1a9d73d4fe03190cf1861e89ba5b958752aba51c6fb5fc5a
        afcc870fa20c507995499794371e8c25e3a7310fa72200c109379973ae236845
        161d83f5e00b64d2bb59f66f51d6725757e289f4311d22377455b0060f0814a2
        0c45a5c3c304d73f1a9d73d4fe03190cf1861e89ba5b958752aba51c6fb5fc5a
        863c0b3f4bfd42d575f2111d65412c8dfc2ddadff05a33209b726654119b4a5f
        73ce7699eeb49be3921196bc6bce506adb8d7ab8c6194eb7a20b939451f4d84a""",
    ),
    (
        3,
        """ea9e5e0a8e5a19bc3d7b1ea0f250a6d2500208278a99dec5baba3cacf53ac351
        9938145964640087730b5a8978b4af58bed8ee6b14abf302f8c7e8b66f91a6d2""",
    ),
    (1, "54ec273cb36f668364085a297dc41c0d479e439934fac9d22246f28fa7fb719f"),
    (3, "799b719ac031fc89c6d8925a487dad07308f837b7ab7bbc7cebd3a4118fd2f38"),
    (2, "38381eeb74dcd60fc3a8a0418a514f6962f218b57cc689599f34351f67e5ef26"),
    (
        3,
        """a39effb1bce1f98b192cfe29077101abd8154c665fc26b94a123d148fbe88905
        8933c87c7254a6bfc8f5083136d02197bafa0ce1bc6e05eecd1d780a92b3bb4e
        f3bf7d48abf756ff0dbba169a7ba1a622952d3f646d08106ee5e214c962259f0
        49d51e5c4c590c5d80b615d1cff4685b4a2a9b078ab3c13e67b72e75ac219e5b
        d4f42f08b3d89713b09611b0714d048cb1e681dd9aca02d3bd885a43b10c2eba
        498a861d308cddf37de2bb05963739fd5984593a7ca587c4b5edf816f628bf7a
        f357b90ad36c248efa80152e27143ab31e33e1a5ca0fa725ea4f8140da5b319e
        c0cbb1bb8deb1faf4ddf1e526c852e977a2247d4fb0465750ef76be40ab1c61c
        49d51e5c4c590c5d80b615d1cff4685b4a2a9b078ab3c13e67b72e75ac219e5b
        39badadb89d842811d3ae6b75a6e598e33d2f73ae46c02d3c9c02b048979255c
        498a861d308cddf37de2bb05963739fd5984593a7ca587c4b5edf816f628bf7a
        c5f6cf53402a0548171df6f99992f1e181ec81fe4e09d5f99512fca0750e872d
        80a7e6420433800e5307e3bad8889952bbb38a2e9701d1841d6478efb446ab15
        8f4a599975cee5e2a200b00cb2cabcac0b954cc7d52ac8e5632771457f8ef059
        4c187b98f26d298b468fcd61bf93d4acabdee1afa6dada74d9392b9ed5543652
        b049b482e2389f9be4ee35dd769ee71fae41cae93e490d65f2780272c41b52db
        76e2a3a7f564e07fe56fae648610076aa9c563991d81f4bba512bb4c9d9ad51e
        27641ed7bf286c5380211a688fab4e11d94893cedd1509010d6dc7ec3bc86963
        9046308867aef4f23ecc69ad443e6b089e052816bbf260062f29db3d8bdc9919
        b0e85e96628144b09c1d1931dd591c4263cce69dcfca97571cbad6c84b7f3a58
        f5da68274e2b92ef374e975d26af572571c0d05aebd60dfd909f9b5b23fd924d
        498a861d308cddf37de2bb05963739fd5984593a7ca587c4b5edf816f628bf7a
        4f91da13fd925185aff5858d61d8701b95d03bfa71b6cd2c05da813894971cf4
        9046308867aef4f23ecc69ad443e6b089e052816bbf260062f29db3d8bdc9919
        013774f83e493e0679ede9b7843b1361ca9b52cb48868c32a7730a5dcd28cc47
        aba1123a6068c130b05097168e1c936231aec71e890613ad009c65113111eb84
        498a861d308cddf37de2bb05963739fd5984593a7ca587c4b5edf816f628bf7a
        de7f70b028f85ce5396aa07a260dbede7210cde09878bd00153372a934bceeb9
        cdb20e90a3db92ba7eb01d066402a106abba38ecc05e0d2f8f931ee02496b904
        a04571f1facd6f5db5dac0514cd9437084183a601c250b7905d4c4068eed74e8
        faef18e72a0ea8451cc37a6e33e24e7a708458096667a9a13258b967e4a3b0c2
        bd044ea37a9e6e7bc6db51d5440a273101e51190e4b31bd6b1f1aaa908b1a608
        b3429a93740167a8a68903aa1bfae3a2e0128bb22168a3458a1b9e98c96d300d
        2590b06635918cb4b497071e4b108614d865835195b8a9646ccf6cc034b149ac
        963d04006c4e0ed836a2eb96ea2cc53a3f267b303501d06f2ed9781902f8f5dc
        664c1fe10cfed5b17f8c83ec89fb2498b3661106930eb2764ade78109f5c8d42
        5007b3ce9959b057b7ffa55a51d8fcbee34d7e92872caa9de0a5e029e56fde0d
        498a861d308cddf37de2bb05963739fd5984593a7ca587c4b5edf816f628bf7a
        49d51e5c4c590c5d80b615d1cff4685b4a2a9b078ab3c13e67b72e75ac219e5b
        1b54c671b6364986932e2a26da7300430fe8e5b3864012da1c1e49ccf334deb7
        4d1f757a823f9b7fe195d4e161c4ce96e256989cc474caa7d0e0a434cc145430
        2c503f44cce74e4385423ed753a7b2fad0f42691528eea8dd18d206a554d8010
        18bb8936812e98504afa3452ea8458ba25ef19ec1b30b450a382ef474ed8700e
        63cc4ce979f213d9f71a93b4277bf36c95d1ec54663f641233fa79b4b5cd183c
        498a861d308cddf37de2bb05963739fd5984593a7ca587c4b5edf816f628bf7a
        de8564716bef9c6c971ba04f50bcd1b10a20e103a4b0d8c9fb218b92c1f715fc
        c9eef8824efbf671f25251594d2318ea8ba13a7c03eab76a6ffc70148059b9ad
        6a1007c86dc8ee319275e7f0638668cfbba0eb3dfb974d2bd8d37dc0433d8fd9
        785c4c15828fba0ace7022c754daca9d11e02f214d087bd4cae865cbb2e480f2
        104fdb3e261f836a1894c0cb89d11bb8d837c1eb09f2119347ecb019d21f60ac
        c699a5c1fe70b3d1912588602bd35fc8de0022011aee12ce9f304e9a9e7e7e2d
        f07cab0ec6cd0b768d5f43e243849c689c09fd69e759076dee3032540a0c0563
        7d6d8b5b5692bbad7807c9e10ba10c8ea1a213a017ae45c21db3e6d01c29816c""",
    ),
    (
        2,
        """7f502fbbfffb4d84bf6dc743fbf59c8bc89ccf90ddcae22196b52b9a3247dd1f
        94949e0c7e1e83e4609c1f5077b0500f2b638d9ca5fc7d2ffd836283ca511fa3""",
    ),
]

EVENTS = [(register, bytes.fromhex(digest)) for register, digests in SEQUENCE for digest in digests.split()]

REGISTERS = {
    1: bytes.fromhex("d76c4b289abcdf0e904ac02df69d48cdc9047723024a605ecb17ecbcb9fb62e3"),
    2: bytes.fromhex("0559c2040dc2045fe06015787de4d4b4d8636a99d298046c52700a100f1fdb64"),
    3: bytes.fromhex("287078930b845b372d7a9504f34d09db7a1ca65c17f59c86fb388bdb4a2bb994"),
}

# type, digest, data, what trustee reads from it, whether the digest is that of the data
DETAILED: list[tuple[int, bytes, bytes, dict[str, Any], bool]] = [
    (
        0x80000001,
        EVENTS[0][1],
        base64.b64decode("Yd/ki8qT0hGqDQDgmAMrjAoAAAAAAAAAAAAAAAAAAABTAGUAYwB1AHIAZQBCAG8AbwB0AA=="),
        {
            "unicode_name": "SecureBoot",
            "unicode_name_length": 10,
            "variable_data": "",
            "variable_data_length": 0,
            "variable_name": "61dfe48b-ca93-d211-aa0d-00e098032b8c",
        },
        True,
    ),
    (0x04, EVENTS[5][1], bytes(4), {}, True),
    (
        0x80000002,
        EVENTS[6][1],
        base64.b64decode("Yd/ki8qT0hGqDQDgmAMrjAkAAAAAAAAAEgAAAAAAAABCAG8AbwB0AE8AcgBkAGUAcgAIAAcAAAABAAIAAwAEAAUABgA="),
        {
            "unicode_name": "BootOrder",
            "unicode_name_length": 9,
            "variable_data": "CAAHAAAAAQACAAMABAAFAAYA",
            "variable_data_length": 18,
            "variable_name": "61dfe48b-ca93-d211-aa0d-00e098032b8c",
        },
        False,
    ),
    (
        0x80000007,
        EVENTS[16][1],
        b"Calling EFI Application from Boot Option",
        {"string": "Calling EFI Application from Boot Option"},
        True,
    ),
    (
        0x80000003,
        EVENTS[21][1],
        base64.b64decode(
            "GNBifQAAAADwlA4AAAAAAAAAAAAAAAAAfAAAAAAAAAACAQwA0EEDCgAAAAABAQYAAAIDAggAAAAAAAQBKgABAAAAAAgAAAAAAAAAwBIAAAAAAA1G/W7ftG1B"
            "lnYKoCnw6UICAgQENABcAEUARgBJAFwAYQBuAG8AbABpAHMAXABzAGgAaQBtAHgANgA0AC4AZQBmAGkAAAB//wQA"
        ),
        {
            "device_paths": [
                "ACPI(PNP0A03,0)",
                "Pci(0,2)",
                "Path(3,2,00000000)",
                "HD(1,GPT,6EFD460D-B4DF-416D-9676-0AA029F0E942,0x800,0x12c000)",
                "File(\\EFI\\anolis\\shimx64.efi)",
            ]
        },
        False,
    ),
    (0x0D, EVENTS[22][1], b"MokList\0", {"string": "MokList"}, False),
    (0x0D, EVENTS[31][1], b"grub_cmd [ xy = xy ]\0#", {"string": "grub_cmd [ xy = xy ]"}, False),
]
TYPE_NAMES = {
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x04: "EV_SEPARATOR",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000007: "EV_EFI_ACTION",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x0D: "EV_IPL",
}


def build_log(events: list[tuple[int, int, bytes, bytes]], end: bytes = b"\xff" * 8) -> bytes:
    """A log in the layout of section 3.12: (register, type, SM3 digest, data) each; its header lists SHA-384 and SM3."""
    spec_id = bytes(24) + (2).to_bytes(4, "little") + bytes.fromhex("0c003000 12002000") + b"\0"
    log = bytes(4) + (3).to_bytes(4, "little") + bytes(20) + len(spec_id).to_bytes(4, "little") + spec_id
    for register, kind, digest, data in events:
        log += b"".join(number.to_bytes(4, "little") for number in (register, kind, 1))
        log += (0x12).to_bytes(2, "little") + digest + len(data).to_bytes(4, "little") + data
    return log + end
