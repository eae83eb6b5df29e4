# Processes of every kind take their locks through the module.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Utils;
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('backends', conf => <<'CONF');
max_prepared_transactions = 10
autovacuum_naptime = 1s
min_parallel_table_scan_size = 0
parallel_setup_cost = 0
parallel_tuple_cost = 0
max_parallel_workers_per_gather = 2
wal_level = logical
CONF

# The processes that are always there have slots.
wait_until($node, <<'SQL', 't', 'every process of the server is registered');
SELECT count(*) >= 6 AND bool_and(b.slot IS NOT NULL AND b.state <> 'unknown')
FROM pg_stat_activity a LEFT JOIN adaptive_lwlock_backends b USING (pid)
WHERE backend_type IN ('checkpointer', 'background writer', 'walwriter', 'autovacuum launcher',
                       'logical replication launcher', 'client backend')
SQL

# Parallel workers.
$node->safe_psql('postgres', 'CREATE TABLE t AS SELECT i, i % 10 AS k FROM generate_series(1, 200000) i; ANALYZE t');
like($node->safe_psql('postgres', 'EXPLAIN (ANALYZE, COSTS OFF) SELECT k, count(*) FROM t GROUP BY k'),
	qr/Workers Launched: [12]/, 'a query uses parallel workers');
my $load = start_load($node, clients => 4, seconds => 4, sql => 'SELECT k, count(*), sum(i) FROM t GROUP BY k');
wait_until($node, <<'SQL', 't', 'parallel workers have slots');
SELECT count(*) > 0 FROM pg_stat_activity JOIN adaptive_lwlock_backends USING (pid)
WHERE backend_type = 'parallel worker' AND slot IS NOT NULL
SQL
finish_load($load, 'parallel queries side by side');
wait_until($node, <<'SQL', 0, 'backends that have ended are not shown');
SELECT count(*) FROM adaptive_lwlock_backends WHERE pid NOT IN (SELECT pid FROM pg_stat_activity)
SQL
is($node->safe_psql('postgres', 'SELECT count(*), sum(i) FROM t'), '200000|20000100000', 'and their result is right');
$node->safe_psql('postgres', 'CREATE INDEX ON t (k, i)');

# Autovacuum.
$node->safe_psql('postgres', 'UPDATE t SET k = k + 1');
wait_until($node, "SELECT autovacuum_count > 0 FROM pg_stat_user_tables WHERE relname = 't'", 't', 'autovacuum runs');

# Checkpointer, background writer, WAL writer under load.
$node->safe_psql('postgres', 'CREATE TABLE u (id serial PRIMARY KEY, v text)');
$load = start_load($node, clients => 4, seconds => 4, sql => "INSERT INTO u (v) SELECT repeat('x', 100) FROM generate_series(1, 20)");
$node->safe_psql('postgres', 'CHECKPOINT') for 1 .. 3;
my $written = finish_load($load, 'inserts during checkpoints');
is($node->safe_psql('postgres', 'SELECT count(*) FROM u'), $written * 20, 'every committed row is there');

# Two-phase commit: the prepared transaction outlives its backend and a restart.
$node->safe_psql('postgres', "BEGIN; INSERT INTO u (v) VALUES ('prepared'); PREPARE TRANSACTION 'one'");
$node->safe_psql('postgres', "BEGIN; INSERT INTO u (v) VALUES ('dropped'); PREPARE TRANSACTION 'two'");
$node->restart;
is($node->safe_psql('postgres', 'SELECT count(*) FROM pg_prepared_xacts'), 2, 'prepared transactions survive a restart');
is($node->safe_psql('postgres', 'SELECT count(*) FROM adaptive_lwlock_backends WHERE pid = 0'), 0, 'and are no backends');
$node->safe_psql('postgres', "COMMIT PREPARED 'one'");
$node->safe_psql('postgres', "ROLLBACK PREPARED 'two'");
is($node->safe_psql('postgres', "SELECT string_agg(v, ',') FROM u WHERE v IN ('prepared', 'dropped')"), 'prepared',
	'and end as told');
run_load($node, 'two-phase commit under load', clients => 8, seconds => 3, sql => <<'SQL');
BEGIN;
INSERT INTO u (v) VALUES ('p');
PREPARE TRANSACTION 'tx:client_id';
COMMIT PREPARED 'tx:client_id'
SQL

# A crash and its recovery (the startup process).
my $rows = $node->safe_psql('postgres', 'SELECT count(*) FROM u');
$node->stop('immediate');
$node->start;
is($node->safe_psql('postgres', 'SELECT count(*) FROM u'), $rows, 'recovery replays everything');
is(status($node, 'active'), 't', 'and the module is active again');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
done_testing();
