"""Pictures from files, addresses, bytes and arrays to RGB; what they are for is not known here."""
