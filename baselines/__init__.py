"""What CLNP is compared with, one method a module, each with its card beside it."""
