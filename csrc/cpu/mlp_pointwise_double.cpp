#include "mlp_pointwise_body.h"

namespace mlp_fusion {

MLP_ELEMENT_TYPE(double)

}  // namespace mlp_fusion
