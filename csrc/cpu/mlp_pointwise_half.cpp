#include "mlp_pointwise_body.h"

namespace mlp_fusion {

MLP_ELEMENT_TYPE(Half)
MLP_ACCUMULATE(Half)

}  // namespace mlp_fusion
