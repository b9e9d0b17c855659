"""What training and sampling will cost (plan, fit), and the original checkpoints converted (convert)."""
