#include "mlp_pointwise_body.h"

namespace mlp_fusion {

MLP_ELEMENT_TYPE(BFloat16)
MLP_ACCUMULATE(BFloat16)

}  // namespace mlp_fusion
