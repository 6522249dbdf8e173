"""PruneTrain inside other trainers and around other libraries' networks, a module for each library."""
