# SIGKILL of any process of the server, the postmaster excepted, under contended load: each time the server comes back as a
# stock one does, with every acknowledged commit, and the module is active again.
# ADAPTIVE_KILLS sets how often (default 10), ADAPTIVE_SEED repeats a choice of victims. All 200:
# SOAK_SECONDS=1800 ADAPTIVE_KILLS=200 scripts/check t/030
use strict;
use warnings;
use TestServer;
use CrashTest;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $kills = $ENV{ADAPTIVE_KILLS} // 10;
my $seed = $ENV{ADAPTIVE_SEED} // time % 1e6;
srand($seed);
note("seed $seed");
mirror('load') unless why_no_bpf();

# What was written survives the death of a process without fsync. Dynamic shared memory lies in files that can be counted.
my $node = new_server('kills', init => { extra => ['--data-checksums'] }, conf => <<'CONF');
restart_after_crash = on
fsync = off
dynamic_shared_memory_type = mmap
autovacuum_naptime = 1s
max_parallel_workers_per_gather = 2
min_parallel_table_scan_size = 0
parallel_setup_cost = 0
parallel_tuple_cost = 0
CONF
create_ledger($node);
my ($postmaster) = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/;
my $source = status($node, 'source');

sub shared_segments { return scalar grep { (split)[4] eq $postmaster } split /\n/, slurp_file('/proc/sysvipc/shm'); }
sub dynamic_segments { return scalar(() = glob($node->data_dir . '/pg_dynshmem/*')); }
my $dynamic = dynamic_segments();
is(shared_segments() . ' ' . ($dynamic > 0), '1 1', 'shared memory can be counted');

# Kills a process of a kind chosen at random, since there are far more backends than others. Some end by themselves first.
sub kill_one
{
	for (1 .. 20)
	{
		my %kind = server_processes($node);
		my @kinds = do { my %seen; grep { !$seen{$_}++ } sort values %kind };
		my $chosen = $kinds[ rand @kinds ];
		my @pids = grep { $kind{$_} eq $chosen } sort keys %kind;
		my $pid = $pids[ rand @pids ];
		my $log = -s $node->logfile;
		next unless kill 'KILL', $pid;
		for (1 .. 100)
		{
			return $chosen if slurp_file($node->logfile, $log) =~ /PID $pid\) was terminated by signal 9/;
			usleep(50_000);
		}
	}
	die 'no process could be killed';
}

my ($entries, $clients, %killed) = (0, 6);
for my $round (1 .. $kills)
{
	my $mode = ('owner', 'blind', 'park')[ $round % 3 ];
	set_mode($node, $mode);
	my $load = start_ledger($node, clients => $clients);
	# Long enough in parallel workers for them to be met.
	my $scans = start_load($node, clients => 2, seconds => 60, sql => 'SELECT sum(length(md5(repeat(balance::text, 50000)))) FROM account');
	$node->poll_query_until('postgres', "SELECT count(*) > $entries + 20 FROM history") or die 'the load does not start';
	usleep(rand 500_000);
	my $victim = kill_one();
	$killed{$victim}++;

	my @problems;
	my $acknowledged = end_load($load) // push @problems, 'the load hangs';
	end_load($scans) // push @problems, 'the queries hang';
	comes_back($node) or die 'the server does not come back';
	my $is = status($node, 'active, source, mode');
	push @problems, "status $is" if $is ne "t|$source|$mode";
	($entries, my @wrong) = check_ledger($node, $entries, $acknowledged, $clients);
	push @problems, @wrong;
	ok(!@problems, "round $round, $mode: $victim") or diag(join "\n", @problems, $load->{out});
	last if @problems;
}
note('killed: ' . join ', ', map { "$killed{$_} $_" } sort keys %killed);

wait_until($node, <<'SQL', 't', 'no slot is lost');
SELECT slots_used <= (SELECT count(*) FROM adaptive_lwlock_backends) + 1 FROM adaptive_lwlock_status()
SQL
is(slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/ ? $1 : '', $postmaster, 'the postmaster lived on');
is(shared_segments(), 1, 'no shared memory is left over');
is(dynamic_segments(), $dynamic, 'nor dynamic shared memory');
is(crashes($node, 9), '', 'nothing else crashed');
run_load($node, 'the server works', clients => 4, seconds => 2, sql => 'SELECT lock_generator_run(200, 200)');
check_relations($node);
is(shared_segments(), 0, 'none when it is stopped');
done_testing();
