package TestServer;

# Helpers for the TAP tests: servers with the module, watched load, the mirror, and steps that need root.
#
# The server refuses to run as root, while loading a mirror and attaching a uprobe need root. So a test that is started as
# root goes on as user postgres and keeps root only as the saved user id, which as_root() uses. Programs started in between
# do not inherit it. Started as anybody else, a test skips what needs root.

use strict;
use warnings;
use Exporter 'import';
use Time::HiRes qw(time usleep);

my $started_as_root;

BEGIN
{
	$started_as_root = $> == 0;
	if ($started_as_root)
	{
		my ($uid, $gid) = (getpwnam('postgres'))[ 2, 3 ];
		# Assigning the pair keeps the saved ids: setresuid(uid, uid, -1).
		($(, $)) = ($gid, "$gid $gid");
		($<, $>) = ($uid, $uid);
	}
}

use IPC::Run;
use MachineUse;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(
  new_server status counters wait_until
  start_load finish_load run_load stalled start_session
  as_root why_no_root why_no_bpf mirror machine_pid
);

# A test that is out of time is told to end: it takes its servers with it.
$SIG{TERM} = sub { exit 1 };

# ---- servers ----

# A running server with the module and the load generator. Further settings in conf; init => {} goes to init().
sub new_server
{
	my ($name, %options) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);
	$node->init(%{ $options{init} // {} });
	$node->append_conf('postgresql.conf', <<"CONF");
shared_preload_libraries = 'lock_generator,adaptive_lwlock'
max_connections = 50
log_statement = none
CONF
	$node->append_conf('postgresql.conf', $options{conf} // '');
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION adaptive_lwlock; CREATE EXTENSION lock_generator');
	return $node;
}

# One column of adaptive_lwlock_status().
sub status
{
	my ($node, $column) = @_;
	return $node->safe_psql('postgres', "SELECT $column FROM adaptive_lwlock_status()");
}

# The counters of a tranche as a hash; all 0 when it has none.
sub counters
{
	my ($node, $tranche) = @_;
	my @names = qw(contended spin_acquired owner_off_cpu budget_spent sleeps wakeups_sent wakeups_spared spin_time);
	my $columns = join ', ', map { "coalesce(sum($_), 0)" } @names;
	my %of;
	@of{@names} = split /\|/,
	  $node->safe_psql('postgres', "SELECT $columns FROM pg_stat_adaptive_lwlock WHERE tranche = '$tranche'");
	return \%of;
}

# Waits until the query returns the expected text.
sub wait_until
{
	my ($node, $query, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	ok($node->poll_query_until('postgres', $query, $expected), $name) or show_activity($node);
	return;
}

# ---- load ----
#
# A lost wake-up shows as a client that never comes back, so every load has a limit after which it is killed and counts as
# failed, and reports its progress every 2 s, so that a stall in the middle is seen as well.

# Starts pgbench on the given SQL. Options: sql, clients, seconds (or transactions: of each client), setup: SQL that every
# client runs before each transaction.
sub start_load
{
	my ($node, %options) = @_;
	my $script = PostgreSQL::Test::Utils::tempdir() . '/load.sql';
	append_to_file($script, "$options{sql};\n");
	my @until = $options{transactions} ? ('-t', $options{transactions}) : ('-T', $options{seconds});
	my %load = (node => $node, out => '', started => time, seconds => $options{seconds} // 0, since => machine_use());
	$load{run} = IPC::Run::start(
		[
			'pgbench', '-n', '-P', '2', '-c', $options{clients}, '-j', '2', @until, '-f', $script,
			'-h', $node->host, '-p', $node->port, 'postgres'
		],
		'<', \undef, '>&', \$load{out});
	return \%load;
}

# Waits for the end of the load and checks that it went well: no error, no stall, in time. Returns the number of
# transactions.
sub finish_load
{
	my ($load, $name, $limit) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $end = $load->{started} + $load->{seconds} + ($limit // 30);
	while ($load->{run}->pumpable)
	{
		$load->{run}->pump_nb;
		last if time > $end;
		usleep(20_000);
	}
	my ($problem, $hangs);
	if ($load->{run}->pumpable && time > $end)
	{
		show_activity($load->{node});
		$load->{run}->kill_kill(grace => 1);
		$hangs = 1;
		$problem = 'it did not end in time';
	}
	elsif (!$load->{run}->finish)
	{
		$problem = 'pgbench failed';
	}
	else
	{
		my ($failed) = $load->{out} =~ /number of failed transactions: (\d+)/;
		$problem = "$failed transactions failed" if $failed;
		$problem = 'it stalled' if stalled($load->{out});
	}
	my ($transactions) = $load->{out} =~ /number of transactions actually processed: (\d+)/;
	$problem = 'no transaction was done' if !$problem && !$transactions;
	ok(!$problem, $name) or diag("$problem:\n$load->{out}\n" . machine_use_since($load->{since}));
	# Whatever came next would hang as well.
	die "the server hangs" if $hangs;
	return $transactions // 0;
}

sub run_load
{
	my ($node, $name, %options) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return finish_load(start_load($node, %options), $name, $options{limit});
}

# Whether pgbench's progress shows a time in which nothing was done. Until its first transaction it connects.
sub stalled
{
	my ($printed) = @_;
	my @rates = $printed =~ /^progress: [\d.]+ s, ([\d.]+) tps/mg;
	my @working = @rates;
	shift @working while @working && $working[0] == 0;
	return @rates && (!@working || grep { $_ == 0 } @working);
}

# A psql that runs one SQL text in the background. Returns { run, out, err, pid of the backend }, once that has begun.
sub start_session
{
	my ($node, $sql) = @_;
	my %session = (out => '', err => '');
	$session{run} = IPC::Run::start(
		[
			'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'),
			'-c', 'SELECT pg_backend_pid()', '-c', $sql
		],
		'<', \undef, '>', \$session{out}, '2>', \$session{err}, IPC::Run::timeout(90));
	$session{run}->pump until $session{out} =~ /^(\d+)\n/ || !$session{run}->pumpable;
	($session{pid}) = $session{out} =~ /^(\d+)\n/;
	$node->poll_query_until('postgres', "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $session{pid} AND query = 'SELECT pg_backend_pid()'")
	  if $session{pid};
	return \%session;
}

# Who waits for what, for the log of a failed test.
sub show_activity
{
	my ($node) = @_;
	my $activity = '';
	eval {
		IPC::Run::run(
			[
				'psql', '-X', '-d', $node->connstr('postgres'),
				'-c', 'SELECT pid, backend_type, state, wait_event_type, wait_event, left(query, 60) AS query
				       FROM pg_stat_activity ORDER BY pid',
				'-c', 'SELECT * FROM adaptive_lwlock_status()',
				'-c', 'SELECT * FROM pg_stat_adaptive_lwlock',
				'-c', 'SELECT * FROM adaptive_lwlock_backends'
			],
			'<', \undef, '>&', \$activity, IPC::Run::timeout(10));
	};
	diag($activity || 'the server does not answer');
	return;
}

# ---- root ----

# Why nothing can be run as root, or nothing.
sub why_no_root { return $started_as_root ? undef : 'needs to be started as root'; }

# Why there cannot be a mirror of the kernel's, or nothing.
sub why_no_bpf { return $ENV{NO_BPF} // why_no_root(); }

# Runs a command as root. Returns its exit status and its output.
sub as_root
{
	my (@command) = @_;
	my $pid = open(my $pipe, '-|') // die "fork: $!";
	if (!$pid)
	{
		$> = 0;
		($<, $>) = (0, 0);
		($(, $)) = (0, '0 0');
		open(STDERR, '>&', \*STDOUT);
		exec(@command) or POSIX::_exit(127);
	}
	my $output = join '', <$pipe>;
	close $pipe;
	note("as root: @command: status " . ($? >> 8) . "\n$output");
	return ($? >> 8, $output);
}

my %loaded;    # as --dir names it

# The ids that the machine's own pid namespace, and so a tracer, has for processes of ours (scripts/private-bpffs).
sub machine_pid
{
	my ($pid) = @_;
	my $machine = $ENV{MACHINE_PROC} // return $pid;
	# When a process began is the same everywhere, and tells it from that number's processes in other namespaces.
	my $began = sub { (split / /, slurp_file("$_[0]/stat") =~ s/.*\) //sr)[19] };
	my $when = $began->("/proc/$pid");
	for my $process (glob "$machine/[0-9]*")
	{
		# It may have ended meanwhile.
		return $process =~ s/.*\///r
		  if eval { slurp_file("$process/status") =~ /^NSpid:.*\s$pid$/m && $began->($process) == $when };
	}
	die "no process $pid on this machine";
}

# mirror('load' / 'unload' / 'status', options of schedmirror …): dies when it fails.
sub mirror
{
	my ($exit, $output) = as_root($ENV{SCHEDMIRROR} // 'schedmirror', @_);
	die "schedmirror @_: $output" if $exit;
	my ($directory) = "@_" =~ /(--dir \S+)/;
	$loaded{ $directory // '' } = $_[0] eq 'load' if $_[0] ne 'status';
	return $output;
}

# A mirror outlives the program that loaded it: the test takes its own with it.
END
{
	my $status = $?;
	for my $directory (grep { $loaded{$_} } keys %loaded)
	{
		as_root($ENV{SCHEDMIRROR} // 'schedmirror', 'unload', split / /, $directory);
	}
	$? = $status;
}

1;
