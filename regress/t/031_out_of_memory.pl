# The kernel's out-of-memory killer takes a backend that holds a lock for which others wait; and a backend to which the
# kernel gives no more memory raises an error and goes on.
use strict;
use warnings;
use TestServer;
use CrashTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $limit = 64 << 20;
my $hog = "SELECT length(repeat('x', 500 * 1000 * 1000))";

# ---- a control group of the test's own ----

my (%group, $why_no_group);

# Finds out how memory is limited here: in a group below this process's own, else below the root. version 1 or 2.
sub make_group
{
	return why_no_root() if why_no_root();
	my $own = slurp_file('/proc/self/cgroup');
	my @places = (
		[ '/sys/fs/cgroup/memory', $own =~ /^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(.*)$/m ? $1 : undef, 'memory.limit_in_bytes', 'memory.oom_control' ],
		[ '/sys/fs/cgroup', $own =~ /^0::(.*)$/m ? $1 : undef, 'memory.max', 'memory.events' ]);
	for my $place (@places)
	{
		my ($root, $path, $maximum, $events) = @$place;
		next unless defined $path;
		for my $parent ("$root$path", $root)
		{
			my $dir = "$parent/adaptive_lwlock.$$";
			next if !-d $parent || (as_root('mkdir', $dir))[0] != 0;
			%group = (dir => $dir, events => "$dir/$events");
			# Where there is swap, it must not take up what does not fit.
			return if (as_root('sh', '-c', "echo $limit >$dir/$maximum && { [ ! -e $dir/memory.swap.max ] || echo 0 >$dir/memory.swap.max; }
			                              if [ -e $dir/memory.memsw.limit_in_bytes ]; then echo $limit >$dir/memory.memsw.limit_in_bytes; fi
			                              [ -e $dir/$events ] && [ \$(cat $dir/$maximum) = $limit ]"))[0] == 0;
			remove_group();
		}
	}
	return 'this system lets no memory control group be made';
}

sub remove_group
{
	as_root('rmdir', $group{dir}) if $group{dir};
	%group = ();
	return;
}
END { my $status = $?; remove_group(); $? = $status; }

sub oom_kills { return slurp_file($group{events}) =~ /^oom_kill (\d+)/m ? $1 : 0; }

# ---- the server ----

mirror('load') unless why_no_bpf();
my $node = new_server('memory', init => { extra => ['--data-checksums'] }, conf => <<'CONF');
restart_after_crash = on
fsync = off
CONF
create_ledger($node);
my $source = status($node, 'source');
my ($entries, $clients) = (0, 4);

SKIP:
{
	$why_no_group = make_group();
	skip $why_no_group, 3 if $why_no_group;

	for my $mode ('owner', 'blind', 'park')
	{
		set_mode($node, $mode);
		my $gate = $node->background_psql('postgres');
		$gate->query('SELECT pg_advisory_lock(1)');
		my $ledger = start_ledger($node, clients => $clients);
		my $holder = start_session($node, 'SELECT lock_generator_run(1000000, 0, 60000, 0, 1, 1000000)');
		my $allocator = start_session($node, "SELECT pg_advisory_lock(1); $hog");
		my @waiters = map { start_session($node, 'SELECT lock_generator_run(1000, 1000, 60000)') } 1 .. 3;
		$node->poll_query_until('postgres', "SELECT count(*) >= 3 FROM pg_stat_activity WHERE wait_event = 'lock_generator'")
		  or die 'nobody waits';

		# The one holds the lock and is the first to go, the other makes memory scarce.
		my $kills = oom_kills();
		as_root('sh', '-c', "echo 1000 >/proc/$holder->{pid}/oom_score_adj
		                     for pid in $holder->{pid} $allocator->{pid}; do echo \$pid >$group{dir}/cgroup.procs; done");
		$gate->query('SELECT pg_advisory_unlock(1)');
		$_->{run}->finish for $holder, $allocator, @waiters;
		my $acknowledged = end_load($ledger);
		$gate->{run}->kill_kill(grace => 1);

		my @problems;
		push @problems, 'the load hangs' unless defined $acknowledged;
		push @problems, 'nothing was killed for memory' if oom_kills() == $kills;
		push @problems, 'the server did not notice'
		  if slurp_file($node->logfile) !~ /PID ($holder->{pid}|$allocator->{pid})\) was terminated by signal 9/;
		comes_back($node) or die 'the server does not come back';
		my $is = status($node, 'active, source, mode');
		push @problems, "status $is" if $is ne "t|$source|$mode";
		($entries, my @wrong) = check_ledger($node, $entries, $acknowledged // 0, $clients);
		ok(!@problems && !@wrong, "$mode: the holder of a lock is killed when memory is used up")
		  or diag(join "\n", @problems, @wrong);
	}
}

# ---- no memory for one backend ----

# Sets the limit of a backend's address space, in bytes beyond what it has.
sub limit_memory
{
	my ($pid, $more) = @_;
	my ($size) = slurp_file("/proc/$pid/status") =~ /^VmSize:\s+(\d+) kB/m;
	return system('prlimit', '--pid', $pid, '--as=' . ($size * 1024 + $more)) == 0;
}

set_mode($node, 'owner');
my $load = start_ledger($node, clients => $clients, seconds => 4);
my $session = $node->background_psql('postgres', on_error_stop => 0);
my $pid = $session->query('SELECT pg_backend_pid()');
ok(limit_memory($pid, $limit), 'a limit can be set');
$session->query($hog);
like($session->{stderr}, qr/ERROR:  out of memory/, 'an allocation beyond it is an error');
$session->{stderr} = '';
is($session->query("SELECT lock_generator_run(200, 200) > 0"), 't', 'after which the session takes locks');
$session->quit;
$entries += finish_load($load, 'the others did not notice');

# Not even a new mirror can be mapped.
SKIP:
{
	skip why_no_bpf(), 3 if why_no_bpf();
	$load = start_load($node, clients => $clients, seconds => 6, sql => 'SELECT lock_generator_run(200, 200, 2, 20)');
	my $of_load = "FROM pg_stat_activity WHERE query LIKE 'SELECT lock_generator_run%'";
	$node->poll_query_until('postgres', "SELECT count(*) = $clients $of_load") or die 'the load does not start';
	my @pids = split /\n/, $node->safe_psql('postgres', "SELECT pid $of_load");
	is(scalar(grep { limit_memory($_, 0) } @pids), $clients, 'backends that get no more memory at all');
	mirror('unload');
	mirror('load');
	ok(defined end_load($load), 'live through a change of the mirror');
	is(status($node, 'active, source'), "t|$source", 'which new ones use');
}

wait_until($node, <<'SQL', 't', 'no slot is lost');
SELECT slots_used <= (SELECT count(*) FROM adaptive_lwlock_backends) + 1 FROM adaptive_lwlock_status()
SQL
is(crashes($node, 9), '', 'nothing else crashed');
check_relations($node);
done_testing();
