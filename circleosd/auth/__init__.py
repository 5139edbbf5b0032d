"""auth-service: users, passwords, sessions."""
