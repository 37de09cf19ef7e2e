"""Everything measured: tables with their JSON, and the code that makes and draws them."""
