/* A gem5 memory under csvfast's engine: gem5's backing store is the DRAM as the host sees it, an access with the C-bit in its address goes
 * through SM4-XTS under the guest's key, one without moves bytes as they are.
 *
 * Written against the interfaces of gem5 23 (AbstractMemory, SimpleTimingPort); NOT compiled against gem5 by this project's tests. To use it,
 * copy this directory to src/mem/csv of a gem5 tree and build gem5 as always.
 */
#ifndef MEM_CSV_CSV_MEMORY_HH
#define MEM_CSV_CSV_MEMORY_HH

#include <csvfast.h>

#include "mem/abstract_mem.hh"
#include "mem/tport.hh"
#include "params/CsvMemory.hh"

namespace gem5
{
namespace memory
{

class CsvMemory : public AbstractMemory
{
  public:
    CsvMemory(const CsvMemoryParams &params);
    ~CsvMemory() override;

    void init() override;
    Port &getPort(const std::string &name, PortID index) override;

  private:
    /* Answers timing requests after the latency that recvAtomic gives. */
    class MemoryPort : public SimpleTimingPort
    {
      public:
        MemoryPort(const std::string &name, CsvMemory &memory) : SimpleTimingPort(name), memory(memory) {}

      protected:
        Tick recvAtomic(PacketPtr packet) override { return memory.perform(packet); }
        void recvFunctional(PacketPtr packet) override { memory.perform(packet); }
        AddrRangeList getAddrRanges() const override;

      private:
        CsvMemory &memory;
    };

    /* Does the access and makes the packet its response. Returns: its latency. */
    Tick perform(PacketPtr packet);

    MemoryPort port;
    const Tick latency, encryptionLatency;
    const Addr cBit;
    const uint32_t asid;
    const std::string seed;
    csvf_engine *engine = nullptr;
};

} // namespace memory
} // namespace gem5

#endif
