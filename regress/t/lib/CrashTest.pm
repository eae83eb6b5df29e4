package CrashTest;

# A ledger under load, which shows after a crash whether every acknowledged commit is there, none by half and none twice.
# Every transaction moves the same amount into an account, a teller and a branch, and writes it down in the history.

use strict;
use warnings;
use Exporter 'import';
use IPC::Run;
use MachineUse;
use Time::HiRes qw(time usleep);
use PostgreSQL::Test::Utils;
use Test::More;
use TestServer;

our @EXPORT = qw(create_ledger start_ledger end_load check_ledger check_relations answers comes_back server_processes set_mode crashes);

sub create_ledger
{
	my ($node) = @_;
	$node->safe_psql('postgres', <<'SQL');
CREATE TABLE account AS SELECT generate_series(1, 1000) AS id, 0::bigint AS balance;
CREATE TABLE teller AS SELECT generate_series(1, 50) AS id, 0::bigint AS balance;
CREATE TABLE branch AS SELECT generate_series(1, 3) AS id, 0::bigint AS balance;
ALTER TABLE account ADD PRIMARY KEY (id);
ALTER TABLE teller ADD PRIMARY KEY (id);
ALTER TABLE branch ADD PRIMARY KEY (id);
CREATE TABLE history (id bigserial PRIMARY KEY, account int, delta int);
CREATE EXTENSION IF NOT EXISTS amcheck;
SQL
	return;
}

# Load that contends for the generator's lock as well as for the server's own.
sub start_ledger
{
	my ($node, %options) = @_;
	return start_load($node, seconds => 60, %options, sql => <<'SQL');
\set account random(1, 1000)
\set delta random(-5000, 5000)
BEGIN;
UPDATE account SET balance = balance + :delta WHERE id = :account;
UPDATE teller SET balance = balance + :delta WHERE id = 1 + :client_id;
UPDATE branch SET balance = balance + :delta WHERE id = 1 + :client_id % 3;
INSERT INTO history (account, delta) VALUES (:account, :delta);
COMMIT;
SELECT lock_generator_run(200, 200, 0.3, 20)
SQL
}

# Waits for the end of a load that may fail. The number of transactions acknowledged to it; undef when it hangs.
sub end_load
{
	my ($load, $limit) = @_;
	my $end = time + ($limit // 60);
	while ($load->{run}->pumpable && time < $end)
	{
		$load->{run}->pump_nb;
		usleep(20_000);
	}
	if ($load->{run}->pumpable)
	{
		diag('the load hangs: ' . machine_use_since($load->{since}));
		$load->{run}->kill_kill(grace => 1);
		return undef;
	}
	$load->{run}->finish;
	my ($transactions) = $load->{out} =~ /number of transactions actually processed: (\d+)/;
	return $transactions // 0;
}

# What is wrong with the ledger, nothing if it is right. It must have grown from so many entries by those that were
# acknowledged, and may have grown by one more for each client, whose commit was not acknowledged any more.
sub check_ledger
{
	my ($node, $before, $acknowledged, $clients) = @_;
	my $row = $node->safe_psql('postgres', <<'SQL');
SELECT count(*), (SELECT sum(balance) FROM account) IS NOT DISTINCT FROM s, (SELECT sum(balance) FROM teller) = s,
       (SELECT sum(balance) FROM branch) = s, count(DISTINCT id) = count(*), nextval('history_id_seq') > max(id)
FROM history, (SELECT sum(delta) AS s FROM history) AS sums GROUP BY s
SQL
	my ($entries, @right) = split /\|/, $row;
	my @problems;
	push @problems, "the sums and keys are wrong: $row" if grep { $_ ne 't' } @right;
	push @problems, "$acknowledged commits were acknowledged, " . ($entries - $before) . ' are there'
	  if $entries < $before + $acknowledged || $entries > $before + $acknowledged + $clients;
	return ($entries, @problems);
}

# Every index agrees with its table, and every page with its checksum. Stops the server.
sub check_relations
{
	my ($node) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($node->safe_psql('postgres', <<'SQL'), '0', 'amcheck finds nothing in the tables');
SELECT count(*) FROM pg_class, verify_heapam(oid) WHERE relkind = 'r' AND relpersistence = 'p'
SQL
	is($node->safe_psql('postgres', <<'SQL'), 't', 'nor in the indexes');
SELECT count(bt_index_check(c.oid, true)) > 50 FROM pg_class c JOIN pg_am a ON a.oid = relam
WHERE amname = 'btree' AND relkind = 'i' AND relpersistence = 'p'
SQL
	$node->stop;
	command_ok([ 'pg_checksums', '--check', $node->data_dir ], 'checksums are right');
	return;
}

# Whether the server takes connections. psql() cannot be asked: it may die when there is none.
sub answers
{
	my ($node) = @_;
	return IPC::Run::run([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', 'SELECT 1' ], '<', \undef, '>&', \my $output);
}

# Waits until it does so again, for a minute.
sub comes_back
{
	my ($node) = @_;
	for (1 .. 300)
	{
		return 1 if answers($node);
		usleep(200_000);
	}
	return 0;
}

# The postmaster's children, pid => kind: 'client backend', 'checkpointer', 'parallel worker', …
sub server_processes
{
	my ($node) = @_;
	my ($postmaster) = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/;
	my %kind;
	for (split /\n/, `ps -o pid=,args= --ppid $postmaster`)
	{
		my ($pid, $title) = /^\s*(\d+) postgres: (?:\S+: )?(.*)/ or next;
		$kind{$pid} = $title =~ /^((?:parallel|autovacuum) worker|(?:autovacuum|logical replication) launcher)/ ? $1
		  : $title =~ /^(checkpointer|background writer|walwriter|startup)/ ? $1
		  : 'client backend';
	}
	return %kind;
}

sub set_mode
{
	my ($node, $mode) = @_;
	$node->safe_psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.mode = $mode");
	$node->reload;
	return;
}

# The lines of the log that no test of crashes expects.
sub crashes
{
	my ($node, $expected_signal) = @_;
	return join "\n", grep { /PANIC|TRAP|was terminated by signal/ && !/was terminated by signal $expected_signal\b/ }
	  split /\n/, slurp_file($node->logfile);
}

1;
