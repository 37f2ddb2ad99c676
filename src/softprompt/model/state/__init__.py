"""What tokens leave behind in a model for those that follow."""
