// Tests of the shim itself.
#pragma once

namespace simt {

void self_test();

}  // namespace simt
