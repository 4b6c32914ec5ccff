"""From a checkpoint and a policy to a plan with every output byte in place."""
