"""Every way to adapt a base model to a task, behind one interface."""
