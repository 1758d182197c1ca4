// The emulator's C interface, which fastattn/emulator/abi.py calls.
#include <algorithm>
#include <new>

#include "emulator/operations.h"

namespace fastattn::emulator {

const std::vector<Operation>& operations() {
  static const std::vector<Operation> all = [] {
    std::vector<Operation> rows;
    Table table(rows);
    add_arithmetic(table);
    add_logic(table);
    add_conversions(table);
    add_accesses(table);
    add_exchanges(table);
    add_matrix(table);
    add_mbarriers(table);
    add_wgmma(table);
    add_bulk_copies(table);
    return rows;
  }();
  return all;
}

}  // namespace fastattn::emulator

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace fastattn::emulator;

// The name of the operation with this index; null past the last.
FASTATTN_EXPORT const char* fastattn_emulator_operation(int index) {
  const auto& all = operations();
  return index < static_cast<int>(all.size()) ? all[index].name.c_str() : nullptr;
}

// Runs a launch. `sites` has an entry for each instruction, `findings` room for
// launch->max_findings. Returns how many findings there are, or -1 without memory.
FASTATTN_EXPORT int fastattn_emulator_run(const Program* program, const Launch* launch,
                                          Finding* findings, Site* sites) {
  try {
    Machine machine(*program, *launch);
    machine.run();
    std::copy(machine.findings.begin(), machine.findings.end(), findings);
    std::copy(machine.sites.begin(), machine.sites.end(), sites);
    return static_cast<int>(machine.findings.size());
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
