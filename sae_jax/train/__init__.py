"""How an SAE is trained: mesh, state, step, optimiser, checkpoints, the loop."""
