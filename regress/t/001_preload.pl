# The module works only from shared_preload_libraries. Loaded in another way it says so and leaves the server as it is.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $error = qr/adaptive_lwlock must be loaded via shared_preload_libraries/;
my $node = PostgreSQL::Test::Cluster->new('plain');
$node->init;
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION adaptive_lwlock');

sub refuses
{
	my ($how, $before) = @_;
	for my $query ('adaptive_lwlock_status()', 'pg_stat_adaptive_lwlock', 'adaptive_lwlock_backends',
		'pg_stat_adaptive_lwlock_reset()')
	{
		my ($exit, $out, $err) = $node->psql('postgres', "$before SELECT * FROM $query");
		ok($exit == 3 && $err =~ $error, "$how: $query refuses") or diag("$exit $out $err");
	}
}

refuses('not preloaded', '');
refuses('LOAD', "LOAD 'adaptive_lwlock';");
$node->append_conf('postgresql.conf', "session_preload_libraries = 'adaptive_lwlock'");
$node->reload;
refuses('session_preload_libraries', '');

$node->append_conf('postgresql.conf', "session_preload_libraries = ''\nshared_preload_libraries = 'adaptive_lwlock'");
$node->restart;
is(status($node, 'active, reason IS NULL, functions_replaced > 0'), 't|t|t', 'preloaded: active');
like(slurp_file($node->logfile), qr/adaptive_lwlock is active/, 'the log says so');

$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->restart;
refuses('taken out again', '');
$node->stop;
done_testing();
