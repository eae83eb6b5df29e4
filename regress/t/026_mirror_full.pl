# A mirror without a free slot costs the processes that have none next to nothing: they look for one where they hold no lock,
# at a few slots each time, less and less often. When slots are free again, they take them.
use strict;
use warnings;
use TestServer;
use RawBpf;
use Throughput;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'the kernel keeps no mirror: ' . why_no_bpf() if why_no_bpf();
plan skip_all => 'bpftrace is not installed' if system('bpftrace --version >/dev/null 2>&1') != 0;

my $slots = 4096;
mirror('load', '--slots', $slots);
my $node = new_server('full', conf => "adaptive_lwlock.sched_state = 'bpf'");
my $claims = bpf_open("$MIRROR_DIR/claims");
my $clients = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT lock_generator%' AND state = 'active'";
my $registered = "SELECT count(*), count(slot) FROM pg_stat_activity LEFT JOIN adaptive_lwlock_backends USING (pid) WHERE query LIKE 'SELECT lock_generator%'";

# Writes process 1 of this pid namespace, which lives, into every claim that is free; empty() frees those again.
my $here = (stat "/proc/self/ns/pid")[1];
my @claimed;
sub fill
{
	my %taken = map { $_ => 1 } split /\n/, $node->safe_psql('postgres', 'SELECT slot FROM adaptive_lwlock_backends WHERE slot IS NOT NULL AND pid <> pg_backend_pid()');
	@claimed = grep { !$taken{$_} } 1 .. $slots;
	bpf_update($claims, $_, pack('LLQLLx40', 1, 0, 0, $here, 0)) for @claimed;
	return;
}
sub empty { bpf_update($claims, $_, pack('LLQx48', 0, 0, 0)) for @claimed; return; }

# The system calls with which a process looks for a slot or after its registration, in so many seconds, by process and call.
sub calls
{
	my ($seconds, @pids) = @_;
	my %ours = map { machine_pid($_) => $_ } @pids;
	my $of_these = join ' || ', map { "pid == $_" } keys %ours;
	my (undef, $said) = as_root('timeout', '--kill-after=5', '60', 'bpftrace', '-e',
		join(' ', map { "tracepoint:syscalls:sys_enter_$_ /$of_these/ { \@[pid, \"$_\"] = count(); }" } 'kill', 'bpf', 'pidfd_open', 'getrusage', 'munmap')
		  . " BEGIN { printf(\"attached\\n\"); } interval:s:$seconds { exit(); }");
	like($said, qr/^attached$/m, 'bpftrace attaches') or diag($said);
	my %calls;
	$calls{ $ours{$1} }{$2} = $3 while $said =~ /^\@\[(\d+), (\w+)\]: (\d+)/mg;
	return \%calls;
}
sub shown { my ($calls) = @_; return join '; ', map { my $pid = $_; "$pid: " . join ', ', map { "$_ $calls->{$pid}{$_}" } sort keys %{ $calls->{$pid} } } sort keys %$calls; }

fill();

# One long transaction that waits for a lock again and again.
my $load = start_load($node, sql => 'SELECT lock_generator_run(1000, 1000, 6000, 20, 100, 200)', clients => 6, transactions => 1);
wait_until($node, "SELECT count(*) FROM ($clients) c", 6, 'six clients in one transaction each');
my @pids = split /\n/, $node->safe_psql('postgres', $clients);
is(shown(calls(3, @pids)), '', 'full: nothing is looked for within a transaction');
is($node->safe_psql('postgres', $registered), '6|0', 'full: no client has a slot');
$node->safe_psql('postgres', "SELECT pg_cancel_backend(pid) FROM ($clients) c");
$load->{run}->finish;

# Many short ones.
$load = start_endless_load($node, sql => 'SELECT lock_generator_run(100, 100, 0.01)', clients => 4);
wait_until($node, $registered, '4|0', 'full: four clients without a slot');
@pids = split /\n/, $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT lock_generator%'");
my $calls = calls(8, @pids);
for my $pid (@pids)
{
	my $kills = $calls->{$pid}{kill} // 0;
	cmp_ok($kills, '<=', 256, "full: process $pid looks at few slots in eight seconds") or diag(shown($calls));
	cmp_ok($kills, '>', 0, "full: but it does look");
}

# Emptied.
empty();
wait_until($node, $registered, '4|4', 'free slots are taken');

# Full once more, and replaced by a larger one.
fill();
my $late = start_endless_load($node, sql => 'SELECT lock_generator_run(200, 100, 0.01)', clients => 4);
wait_until($node, $registered, '8|4', 'full: four more without a slot');
mirror('unload');
mirror('load', '--slots', 2 * $slots);
wait_until($node, $registered, '8|8', 'a larger mirror: everybody has a slot');
$node->safe_psql('postgres', 'CHECKPOINT');
is($node->safe_psql('postgres', "SELECT count(slot) FROM pg_stat_activity JOIN adaptive_lwlock_backends USING (pid) WHERE backend_type = 'checkpointer'"),
	1, 'a process that ends no transactions as well');
end_load($_, 'the loads go on') for $load, $late;
like(slurp_file($node->logfile), qr/runs without a slot in the mirror.*\n.*slots of the mirror are taken/, 'the log says that slots were missing');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
mirror('unload');
done_testing();
