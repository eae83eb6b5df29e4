# A mirror full of nonsense that changes all the time. The kernel's own array cannot be written by anybody, so the server gets
# another one, with the same layout, in its place.
use strict;
use warnings;
use TestServer;
use RawBpf;
use Throughput;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'the kernel keeps no mirror: ' . why_no_bpf() if why_no_bpf();

my $slots = 100;
mirror('load', '--slots', $slots);
as_root_do(
	sub {
		my $fd = bpf_create_array(64, $slots + 1);
		bpf_update($fd, 0, mirror_header(slots => $slots + 1));
		unlink "$MIRROR_DIR/slots" or die "unlink: $!";
		bpf_pin($fd, "$MIRROR_DIR/slots");
		chown 0, scalar getgrnam('postgres'), "$MIRROR_DIR/slots" or die "chown: $!";
		chmod 0660, "$MIRROR_DIR/slots" or die "chmod: $!";
	});

# The contents: state, cpu, tid, generation, time of the last switch, number of switches.
my %contents = (
	# An array of random generations takes everybody's slot away again and again, so that nobody believes the rest of it.
	'random bytes' => sub { random_bytes(64 * $slots) },
	'random, but everybody keeps the slot' => sub {
		my $random = random_bytes(64 * $slots);
		substr($random, 64 * $_ + 12, 4) = pack('L', 0) for 0 .. $slots - 1;
		substr($random, 64 * $_, 4) = pack('L', int rand 6) for 0 .. $slots - 1;
		return $random;
	},
	'all on a CPU' => sub { join '', map { pack('L4Q2x32', 1, 0, 0, 0, 0, $_[0]) } 1 .. $slots },
	'all blocked' => sub { join '', map { pack('L4Q2x32', 3, 0, 0, 0, 0, $_[0]) } 1 .. $slots },
);
my $scribbler;

sub scribble
{
	my ($name) = @_;
	stop_doing($scribbler) if $scribbler;
	$scribbler = start_doing(
		1,
		sub { bpf_open("$MIRROR_DIR/slots") },
		sub {
			my ($fd, $round) = @_;
			bpf_update_all($fd, 1, $slots, $contents{$name}->($round));
		});
	return;
}

my $node = new_server('hostile');
is(status($node, 'active, source, slots_total'), "t|bpf|$slots", 'the server takes the mirror for a good one');

# A load beside it all notices a stall.
my $all_along = start_endless_load($node, sql => 'SELECT lock_generator_stress(2000, 50)', clients => 4);
my @names = sort keys %contents;
for my $name (@names)
{
	scribble($name);
	my @states = split /\n/, $node->safe_psql('postgres', <<'SQL');
CREATE TEMP TABLE seen (state text, slot int);
DO $$ BEGIN FOR i IN 1..500 LOOP INSERT INTO seen SELECT state, slot FROM adaptive_lwlock_backends; END LOOP; END $$;
SELECT DISTINCT state FROM seen;
SQL
	is(join(' ', grep { !/^(on_cpu|preempted|blocked|dead|unknown)$/ } @states), '', "$name: the view shows nothing but states");
	is(status($node, 'active'), 't', "$name: the module is active");
}
end_load($all_along, 'the load goes on');
is($node->safe_psql('postgres', 'SELECT exclusive = value FROM lock_generator_stress_totals()'), 't', 'and no update is lost');

# Whatever it says of a holder that sleeps for long, no spin outlasts its budget of 0.2 ms, except for being preempted in it.
for my $name (@names)
{
	scribble($name);
	$node->safe_psql('postgres', 'SELECT pg_stat_adaptive_lwlock_reset()');
	run_load($node, "$name: holders that sleep for 200 ms", sql => 'SELECT lock_generator_run(1000, 0, 0.002, 0, 1, 200000)', clients => 4, transactions => 1);
	my $n = counters($node, 'lock_generator');
	cmp_ok($n->{contended}, '>', 0, "$name: others wait");
	cmp_ok($n->{spin_time} / ($n->{contended} + $n->{sleeps}), '<', 20, "$name: and do not spin as long")
	  or diag(join ', ', map { "$_ $n->{$_}" } sort keys %$n);
}
owner_keeps_up($node, map { my $name = $_; $name => sub { scribble($name) } } @names);

# A header that changes as well: unloaded, loaded, another version, anything.
stop_doing($scribbler);
$scribbler = start_doing(
	1,
	sub { bpf_open("$MIRROR_DIR/slots") },
	sub {
		my ($fd, $round) = @_;
		bpf_update_all($fd, 0, $slots + 1, ($round % 3 ? mirror_header(slots => $slots + 1, active => int rand 2) : random_bytes(64)) . random_bytes(64 * $slots));
	});
run_load($node, 'a random header', sql => 'SELECT lock_generator_stress(2000, 50)', clients => 8, seconds => 4);
my $rounds = stop_doing($scribbler);
cmp_ok($rounds, '>', 100, 'it did change');

# Left alone, it is one that nobody keeps. It is found out, and a true one taken instead.
as_root_do(sub { my $fd = bpf_open("$MIRROR_DIR/slots"); bpf_update($fd, 0, mirror_header(slots => $slots + 1)); });
my $sleepy = start_endless_load($node, sql => 'SELECT lock_generator_run(1000, 1000, 2, 20, 100, 200)', clients => 8);
wait_until($node, "SELECT source, source_reason ~ 'stale' FROM adaptive_lwlock_status()", 'off|t', 'left alone: found stale');
mirror('unload');
mirror('load');
wait_until($node, 'SELECT source, source_reason IS NULL FROM adaptive_lwlock_status()', 'bpf|t', 'a true mirror is taken');
end_load($sleepy, 'the load goes on');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
mirror('unload');
done_testing();
