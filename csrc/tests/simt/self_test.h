// Tests of the shim itself.
#pragma once

namespace simt {

void self_test();
void tensor_test();

}  // namespace simt
