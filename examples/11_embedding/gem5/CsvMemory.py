"""Parameters of a gem5 memory whose content is encrypted by csvfast. See csv_memory.hh."""

from m5.objects.AbstractMemory import AbstractMemory
from m5.params import Param, ResponsePort


class CsvMemory(AbstractMemory):
    type = "CsvMemory"
    cxx_header = "mem/csv/csv_memory.hh"
    cxx_class = "gem5::memory::CsvMemory"

    port = ResponsePort("Where requests come in, with the C-bit in the address")
    latency = Param.Latency("30ns", "Of an access")
    encryption_latency = Param.Latency("3ns", "More, if the C-bit is set")
    c_bit = Param.Unsigned(47, "Position of the C-bit in a physical address")
    asid = Param.Unsigned(1, "Guest whose accesses have the C-bit set")
    seed = Param.String("", "INSECURE: derives the key from this text, for runs that repeat; empty: a random key")
