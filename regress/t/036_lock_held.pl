# Another module holds an LWLock while the functions would be replaced: the server's own list of locks held, which is not the
# replacement's, has it. The server starts, and comes back after a crash.
use strict;
use warnings;
use TestServer;
use CrashTest;
use OtherServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('lock_held', conf => "restart_after_crash = on\nfsync = off\n");
$node->stop;

my $rude = PostgreSQL::Test::Utils::tempdir() . '/rude.so';
my ($source) = grep { -e } map { "$_/rude.c" } @INC;
my $built = `cc -O2 -shared -fPIC -I'@{[ $node->config_data('--includedir-server') ]}' -o $rude $source 2>&1`;
is($built, '', 'the other module is built');
my $preload = "lock_generator,adaptive_lwlock,$rude";
my $held = qr/another module holds the LWLock "rude"/;

# One backend is killed; what the log says from then on.
sub crash
{
	my $log = -s $node->logfile;
	kill 'KILL', start_session($node, 'SELECT pg_sleep(60)')->{pid};
	$node->wait_for_log(qr/all server processes terminated; reinitializing/, $log);
	comes_back($node) or die 'the server does not come back: ' . slurp_file($node->logfile, $log);
	return slurp_file($node->logfile, $log);
}

sub works
{
	my ($name) = @_;
	return run_load($node, "$name: the server works", clients => 4, seconds => 1, sql => 'SELECT lock_generator_run(200, 200)');
}

is_stock($node, 'held at start', $held, preload => $preload);
like(crash(), qr/adaptive_lwlock is not active.*\n.*DETAIL: .*$held/, 'held at start: the same after a crash, in the log');
is(status($node, 'active, functions_replaced'), 'f|0', 'held at start: and in the status');
works('held at start, after a crash');
$node->stop;

# The functions are replaced then, and the lock is in the replacement's list.
$node->append_conf('postgresql.conf', 'rude.from = 2');
is_active($node, 'held after a crash', preload => $preload);
like(crash(), qr/adaptive_lwlock is active/, 'held after a crash: active again');
works('held after a crash');
cmp_ok(counters($node, 'lock_generator')->{contended}, '>', 0, 'held after a crash: by the replacements');
is(status($node, 'active'), 't', 'held after a crash: and says so');
$node->stop;

$node->append_conf('postgresql.conf', 'rude.from = 1');
is_active($node, 'listed before', preload => "lock_generator,$rude,adaptive_lwlock");
$node->stop;
done_testing();
