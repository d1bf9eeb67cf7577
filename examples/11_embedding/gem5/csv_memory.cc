#include "mem/csv/csv_memory.hh"

#include <vector>

#include "base/logging.hh"

namespace gem5
{
namespace memory
{

namespace
{

void
need(int status, const char *what)
{
    fatal_if(status != CSVF_OK, "csvfast: %s: %s", what, csvf_status_text(status));
}

} // namespace

CsvMemory::CsvMemory(const CsvMemoryParams &params)
    : AbstractMemory(params), port(name() + ".port", *this), latency(params.latency), encryptionLatency(params.encryption_latency),
      cBit(Addr(1) << params.c_bit), asid(params.asid), seed(params.seed)
{
}

CsvMemory::~CsvMemory() { csvf_engine_destroy(engine); }

void
CsvMemory::init()
{
    AbstractMemory::init();
    fatal_if(!port.isConnected(), "%s is not connected", name());
    fatal_if(range.interleaved(), "%s: interleaved ranges are not supported", name());
    fatal_if(range.end() > cBit, "%s: the C-bit lies inside the address range", name());

    csvf_config config = {};
    config.struct_size = sizeof config;
    config.base_address = range.start();
    need(csvf_init(), "csvf_init");
    // The system has given the backing store before init(); what is loaded into it is the host's, hence plaintext.
    need(csvf_engine_create_on(&engine, pmemAddr, range.size(), &config), "csvf_engine_create_on");
    if (!seed.empty())
        need(csvf_engine_set_deterministic_insecure(engine, seed.data(), seed.size()), "seed");
    need(csvf_asid_generate(engine, asid), "csvf_asid_generate");
    port.sendRangeChange();
}

Port &
CsvMemory::getPort(const std::string &name, PortID index)
{
    return name == "port" ? port : AbstractMemory::getPort(name, index);
}

/* Both names of the memory: without and with the C-bit. */
AddrRangeList
CsvMemory::MemoryPort::getAddrRanges() const
{
    const AddrRange &range = memory.range;
    return {range, AddrRange(range.start() | memory.cBit, range.end() | memory.cBit)};
}

Tick
CsvMemory::perform(PacketPtr packet)
{
    const Addr address = packet->getAddr() & ~cBit;
    const bool isEncrypted = packet->getAddr() & cBit;
    const uint32_t who = isEncrypted ? asid : 0;
    const unsigned length = packet->getSize();

    panic_if(packet->isLLSC() || packet->isAtomicOp() || packet->cmd == MemCmd::SwapReq,
             "%s: %s belongs into a cache above this memory", name(), packet->cmdString());
    if (packet->isRead()) {
        need(csvf_read(engine, packet->getPtr<uint8_t>(), length, who, address), "read");
    } else if (packet->isWrite()) {
        std::vector<uint8_t> data(length);
        packet->writeData(data.data());
        if (packet->isMaskedWrite()) {
            // Bytes that the mask leaves out keep what is there.
            need(csvf_read(engine, data.data(), length, who, address), "read");
            packet->writeData(data.data());
        }
        need(csvf_write(engine, who, address, data.data(), length), "write");
    }
    if (packet->needsResponse())
        packet->makeResponse();
    return latency + (isEncrypted ? encryptionLatency : 0);
}

} // namespace memory
} // namespace gem5
