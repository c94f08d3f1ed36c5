"""How much each block contributes to the residual stream and to the prediction."""
