"""Words, figures and pages for people; nothing here knows what they show."""
