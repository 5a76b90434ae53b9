"""Building blocks that know nothing of detection."""
