# A lock that one process has taken and given away, and another one releases (since version 18).
use strict;
use warnings;
use TestServer;
use OtherServer;
use PostgreSQL::Test::Utils;
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('disowned', conf => "fsync = off\n");
my $version = $node->safe_psql('postgres', 'SHOW server_version_num');
if ($version < 180000)
{
	$node->stop;
	plan skip_all => 'before version 18 there are no such locks';
}

my $library = PostgreSQL::Test::Utils::tempdir() . '/disown.so';
my ($source) = grep { -e } map { "$_/disown.c" } @INC;
my $built = `cc -O2 -shared -fPIC -I'@{[ $node->config_data('--includedir-server') ]}' -o $library $source 2>&1`;
is($built, '', 'the module that gives a lock away is built');
$node->stop;
is_active($node, 'it is preloaded', preload => "$library,lock_generator,adaptive_lwlock");
$node->safe_psql('postgres', "CREATE FUNCTION $_(shared bool) RETURNS bool LANGUAGE C AS '$library'")
  for 'disown_take', 'disown_release', 'disown_wait';
$node->safe_psql('postgres', 'SELECT pg_stat_adaptive_lwlock_reset()');

for my $mode ('owner', 'blind', 'park')
{
	for my $shared ('false', 'true')
	{
		my $what = "$mode, " . ($shared eq 'true' ? 'shared' : 'exclusive');
		# The one who took it does not hold it any more: an error releases nothing, and it can be interrupted.
		my ($status, $out, $error) = $node->psql('postgres',
			"SELECT disown_take($shared); SET statement_timeout = 100; SELECT pg_sleep(60)", on_error_stop => 1);
		is($out, 'f', "$what: it is given away");
		like($error, qr/statement timeout/, "$what: who took it goes on");

		my @waiters = map { start_session($node, "SET adaptive_lwlock.mode = $mode; SELECT disown_wait(false)") } 1 .. 3;
		wait_until($node, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'LWLock' AND wait_event = 'disown'", 3,
			"$what: others wait");
		is($node->safe_psql('postgres', "SELECT disown_release($shared)"), 'f', "$what: another one releases it");
		for my $waiter (@waiters)
		{
			ok($waiter->{run}->finish, "$what: a waiter ends");
			is($waiter->{out}, "$waiter->{pid}\nt\n", "$what: it got the lock");
		}
	}
}

# Whoever waits for a lock that nobody owns does not know of whom.
my $n = counters($node, 'disown');
note(join ', ', map { "$_ $n->{$_}" } sort keys %$n);
cmp_ok($n->{sleeps}, '>=', 18, 'every waiter slept');
is($node->safe_psql('postgres', 'SELECT disown_wait(false), disown_wait(true)'), 't|t', 'the lock is free in the end');

# Taken and released by many.
my $turns = "SELECT disown_take(false); SELECT disown_release(false)";
run_load($node, 'many give it away', clients => 8, seconds => 3, sql => $turns);
is($node->safe_psql('postgres', 'SELECT disown_wait(false)'), 't', 'and it is free again');
$node->stop;
done_testing();
