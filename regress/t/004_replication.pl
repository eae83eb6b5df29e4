# A streaming standby and a logical subscriber, all with the module, follow a primary under load.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

mirror('load') unless why_no_bpf();
my $primary = new_server('primary', init => { allows_streaming => 'logical' });
$primary->safe_psql('postgres', 'CREATE TABLE t (id bigserial PRIMARY KEY, v int)');

$primary->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;

my $subscriber = new_server('subscriber', init => { allows_streaming => 'logical' });
$subscriber->safe_psql('postgres', 'CREATE TABLE t (id bigint PRIMARY KEY, v int)');
$primary->safe_psql('postgres', 'CREATE PUBLICATION p FOR TABLE t');
$subscriber->safe_psql('postgres', "CREATE SUBSCRIPTION s CONNECTION '" . $primary->connstr . " dbname=postgres' PUBLICATION p");
$subscriber->wait_for_subscription_sync($primary, 's');

my $load = start_load($primary, clients => 8, seconds => 6, sql => <<'SQL');
INSERT INTO t (v) VALUES (:client_id);
UPDATE t SET v = v + 1 WHERE id = (SELECT max(id) - 20 * (1 + :client_id) FROM t)
SQL
my $registered = <<'SQL';
SELECT count(*) > 0 FROM pg_stat_activity JOIN adaptive_lwlock_backends USING (pid) WHERE slot IS NOT NULL AND backend_type LIKE
SQL
wait_until($primary, "$registered 'walsender'", 't', 'WAL senders are registered');
wait_until($standby, "$registered 'walreceiver'", 't', 'the WAL receiver is registered');
wait_until($standby, "$registered 'startup'", 't', 'the startup process is registered');
wait_until($subscriber, "$registered 'logical replication%worker'", 't', 'the apply worker is registered');
is(status($standby, 'active'), 't', 'the module is active in a standby');
run_load($standby, 'readers on the standby', clients => 4, seconds => 3, sql => 'SELECT count(*), sum(v) FROM t');
finish_load($load, 'the primary under load');

my $all = 'SELECT count(*), sum(v), sum(id) FROM t';
my $expected = $primary->safe_psql('postgres', $all);
$primary->wait_for_catchup($standby);
is($standby->safe_psql('postgres', $all), $expected, 'the standby has it all');
$primary->wait_for_catchup('s');
is($subscriber->safe_psql('postgres', $all), $expected, 'the subscriber has it all');

# Synchronous commit waits for the standby in every transaction.
$primary->append_conf('postgresql.conf', "synchronous_standby_names = 'standby'");
$primary->reload;
run_load($primary, 'synchronous replication', clients => 8, seconds => 3, sql => 'INSERT INTO t (v) VALUES (1)');

$standby->promote;
run_load($standby, 'the promoted standby under load', clients => 4, seconds => 2, sql => 'INSERT INTO t (v) VALUES (1)');
unlike(slurp_file($_->logfile), qr/PANIC|TRAP|was terminated by signal/, $_->name . ': no process crashed')
  for $primary, $standby, $subscriber;
$subscriber->stop;
$standby->stop;
$primary->append_conf('postgresql.conf', "synchronous_standby_names = ''");
$primary->stop('immediate');
done_testing();
