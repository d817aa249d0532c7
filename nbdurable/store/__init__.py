"""The store: its port, DuckDB behind it, named SQL, numbered migrations. Nothing else imports duckdb."""
