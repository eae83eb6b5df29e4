# One mirror for two servers, fewer slots than processes, more than one program that keeps it, and members of the group who use
# their right to write its claims and registrations to spoil them.
use strict;
use warnings;
use TestServer;
use RawBpf;
use Throughput;
use PostgreSQL::Test::Utils;
use Errno;
use Test::More;

plan skip_all => 'the kernel keeps no mirror: ' . why_no_bpf() if why_no_bpf();

my $slots = 100;
my $contended = 'SELECT lock_generator_run(1000, 1000, 2, 20, 100, 200)';
my $exact = 'SELECT lock_generator_stress(2000, 50)';
my $registered = "SELECT count(*), count(slot) FROM pg_stat_activity LEFT JOIN adaptive_lwlock_backends USING (pid) WHERE query LIKE 'SELECT lock_generator%'";
my $good = 'SELECT source, source_reason IS NULL FROM adaptive_lwlock_status()';

mirror('load', '--slots', $slots);
my $one = new_server('one');
my $two = new_server('two');

# Two servers under load: every process has a slot, and none has another's.
my @loads = map { start_endless_load($_, sql => $contended, clients => 6) } $one, $two;
wait_until($_, $registered, '6|6', $_->name . ': every client is registered') for $one, $two;
for my $round (1 .. 5)
{
	my %pid_of;
	for my $node ($one, $two)
	{
		for (split /\n/, $node->safe_psql('postgres', "SELECT slot, pid FROM adaptive_lwlock_backends WHERE slot IS NOT NULL AND pid <> pg_backend_pid()"))
		{
			my ($slot, $pid) = split /\|/;
			fail("round $round: processes $pid and $pid_of{$slot} have slot $slot") if exists $pid_of{$slot};
			$pid_of{$slot} = $pid;
		}
	}
	cmp_ok(scalar keys %pid_of, '>=', 12 + 2 * 5, "round $round: both servers' processes have slots of their own");
}
$two->stop('immediate');
wait_until($one, "SELECT slots_used <= (SELECT count(slot) FROM adaptive_lwlock_backends) + 1 FROM adaptive_lwlock_status()", 't',
	'the slots of a server that was shot come back');
$loads[1]{run}->finish;
end_load($loads[0], 'the other one goes on');

# The program a second time: loaded again, a copy elsewhere with arrays of its own, and the same one attached once more.
my $again = as_root_do(sub { `$ENV{SCHEDMIRROR} load` });
like($again, qr/loaded already/, 'loading twice: it is there already');
mirror('load', '--slots', $slots, '--dir', "${MIRROR_DIR}_copy");
my $holder = start_doing(1, sub { bpf_attach_again(bpf_program_of_link("$MIRROR_DIR/sched_switch")) }, sub { });
my $load = start_endless_load($one, sql => $contended, clients => 6);
wait_until($one, $registered, '6|6', 'kept twice: every client is registered');
is( $one->safe_psql('postgres', <<'SQL'), 't', 'kept twice: a process that runs sees itself on a CPU');
DO $$ DECLARE seen int := 0; BEGIN
	FOR i IN 1..200 LOOP
		PERFORM FROM adaptive_lwlock_backends WHERE pid = pg_backend_pid() AND state = 'on_cpu';
		IF FOUND THEN seen := seen + 1; END IF;
	END LOOP;
	PERFORM set_config('test.seen', (seen >= 190)::text, false);
END $$;
SELECT current_setting('test.seen')::bool;
SQL
end_load($load, 'kept twice: the load goes on');
owner_keeps_up($one, 'kept twice' => sub { });
stop_doing($holder);
mirror('unload', '--dir', "${MIRROR_DIR}_copy");
is($one->safe_psql('postgres', $good), 'bpf|t', 'the copy is taken out: the mirror is in use');

# A member of the group (the server's user is one) writes what it can. Nobody needs to be root for this.
for my $what ('claims', 'registrations')
{
	my $all_along = start_endless_load($one, sql => $exact, clients => 8);
	wait_until($one, $registered, '8|8', "spoiled $what: every client was registered before");
	my $spoiler;
	if ($what eq 'claims')
	{
		$spoiler = start_doing(0, sub { bpf_open("$MIRROR_DIR/claims") }, sub { bpf_update_all($_[0], 0, $slots + 1, random_bytes(64 * ($slots + 1))) });
	}
	else
	{
		# It registers itself for the others' slots, with generations of its own.
		$spoiler = start_doing(
			0,
			sub { bpf_open("$MIRROR_DIR/register") },
			sub { my ($register, $round) = @_; bpf_register($register, $round % ($slots + 2), int rand 2**32); });
	}
	owner_keeps_up($one, "spoiled $what" => sub { });
	run_load($one, "spoiled $what: processes come and go", sql => '\set n random(1, 5)' . "\nSELECT lock_generator_stress(500, 50), pg_sleep(0.001 * :n)",
		clients => 8, transactions => 20)
	  for 1 .. 2;
	cmp_ok(stop_doing($spoiler), '>', 100, "spoiled $what: it did happen");
	end_load($all_along, "spoiled $what: the load goes on");
	is(status($one, 'active'), 't', "spoiled $what: the module is active");

	# Nonsense in the claims does not keep slots for ever, but what else was done may leave the mirror unusable; then it says so.
	my $seen = $one->safe_psql('postgres', $good);
	like($seen, qr/^(bpf\|t|off\|f)$/, "spoiled $what: a mirror, or a reason");
	mirror('unload');
	mirror('load', '--slots', $slots);
	wait_until($one, $good, 'bpf|t', "spoiled $what: loaded anew, the mirror is in use");
}
is($one->safe_psql('postgres', 'SELECT exclusive = value FROM lock_generator_stress_totals()'), 't', 'no update is lost');

# All slots claimed, in the name of a process that lives: old processes keep theirs, new ones work without.
# The server is a new one: missing slots are reported once a minute at most, and those of the spoiled mirror may have been.
$one->restart;
my $claims = bpf_open("$MIRROR_DIR/claims");
$load = start_endless_load($one, sql => $exact, clients => 4);
wait_until($one, $registered, '4|4', 'all slots claimed: who was there before');
my %taken = map { $_ => 1 } split /\n/, $one->safe_psql('postgres', 'SELECT slot FROM adaptive_lwlock_backends WHERE slot IS NOT NULL AND pid <> pg_backend_pid()');
bpf_update($claims, $_, pack('LLQx48', 1, 0, 0)) for grep { !$taken{$_} } 1 .. $slots;
is($one->safe_psql('postgres', $registered), '4|4', 'keeps the slot');
is($one->safe_psql('postgres', 'SELECT count(*), count(slot) FROM adaptive_lwlock_backends WHERE pid = pg_backend_pid()'), '1|0', 'a new one has none');
is($one->safe_psql('postgres', $good), 'bpf|t', 'the mirror is in use');
owner_keeps_up($one, 'all slots claimed' => sub { });
end_load($load, 'all slots claimed: the load goes on');
like(slurp_file($one->logfile), qr/runs without a slot in the mirror.*\n.*all $slots slots of the mirror are taken/, 'and the log says so');
bpf_update($claims, $_, pack('LLQx48', 0, 0, 0)) for grep { !$taken{$_} } 1 .. $slots;

unlike(slurp_file($_->logfile), qr/PANIC|TRAP|was terminated by signal/, $_->name . ': no process crashed') for $one, $two;
$one->stop;
mirror('unload');
done_testing();
