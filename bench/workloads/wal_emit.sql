-- Nothing but WAL: the insertion locks and the position in the log.
SELECT count(pg_logical_emit_message(false, 'bench', repeat('x', 32))) FROM generate_series(1, 100);
