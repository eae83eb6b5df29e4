# Who may do what with the mirror: nothing outside its group; inside, take part, and neither write what the kernel writes nor
# take anything out.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Utils;
use RawBpf;
use Test::More;

plan skip_all => 'the kernel keeps no mirror: ' . why_no_bpf() if why_no_bpf();
plan skip_all => 'there is no user nobody' if !getpwnam('nobody');

mirror('load', '--slots', 100);
my $node = new_server('rights');
# A copy that everybody may run: the checkout may be closed to others.
my $command = "$ENV{TESTDIR}/schedmirror";
as_root('install', '-m', '755', $ENV{SCHEDMIRROR} // 'schedmirror', $command);
my @pins = ('slots', 'claims', 'notes', 'register', 'deactivate', 'sched_switch', 'process_exit');
my ($program, $link) = split / /, as_root_do(sub { my (undef, $id, $program) = bpf_info(bpf_open("$MIRROR_DIR/sched_switch")); "$program $id" });
cmp_ok($program, '>', 0, 'the program has a number');

# What somebody cannot do; `done` if it can be done after all.
sub refused
{
	my ($user, $name, $reason, $code) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $said = as_other_do($user, sub { eval { $code->() || die "$!\n"; 'done' } || $@ });
	like($said, $reason, "$user: $name");
	return;
}
my $denied = qr/Permission denied/;
my $not_permitted = qr/Operation not permitted/;

refused('nobody', "open $_", $denied, sub { bpf_open("$MIRROR_DIR/$_") }) for @pins;
refused('nobody', 'list the directory', $denied, sub { opendir(my $dir, $MIRROR_DIR) });
refused('nobody', 'find a pin', $denied, sub { stat("$MIRROR_DIR/slots") });

for my $user ('nobody', 'postgres')
{
	refused($user, 'reach the program by its number', $not_permitted, sub { bpf_by_id('prog', $program) });
	refused($user, 'reach its attachment by its number', $not_permitted, sub { bpf_by_id('link', $link) });
	refused($user, "remove $_", $denied, sub { unlink "$MIRROR_DIR/$_" }) for @pins;
	refused($user, 'put something there', $denied, sub { mkdir "$MIRROR_DIR/more" });
	refused($user, 'move it away', qr/$denied|$not_permitted/, sub { rename $MIRROR_DIR, "${MIRROR_DIR}_mine" });
	refused($user, 'open it to others', qr/$denied|$not_permitted/, sub { chmod 0777, $MIRROR_DIR });
	for my $what ('load', 'unload')
	{
		my $said = as_other_do($user, sub { `$command $what 2>&1` . $? });
		like($said, $user eq 'postgres' && $what eq 'load' ? qr/loaded already.*\n0$/ : qr/run as root\n256$/, "$user: schedmirror $what");
	}
}

# Members of the group open four of them, to take part.
is(as_other_do('postgres', sub { bpf_open("$MIRROR_DIR/$_") for 'slots', 'claims', 'notes', 'register'; 'opened' }), 'opened', 'postgres: opens slots, claims, notes and register');
refused('postgres', "open $_", $denied, sub { bpf_open("$MIRROR_DIR/$_") }) for 'deactivate', 'sched_switch', 'process_exit';
refused('postgres', "write slot $_", $not_permitted, sub { bpf_update(bpf_open("$MIRROR_DIR/slots"), $_, "\0" x 64); 1 }) for 0, 1, 100;
refused('postgres', 'write all slots', $not_permitted, sub { bpf_update_all(bpf_open("$MIRROR_DIR/slots"), 0, 101, "\0" x (64 * 101)); 1 });
my ($registrations) = (as_root('bpftool', 'map', 'show', 'name', 'tasks'))[1] =~ /^(\d+): task_storage/m;
refused('postgres', 'reach the registrations by their number', $not_permitted, sub { bpf_by_id('map', $registrations) });
refused('postgres', 'register another', qr/Invalid argument/, sub { bpf_update(bpf_open("$MIRROR_DIR/register"), $$, pack('LL', 7, 1000)); 1 });
refused('postgres', 'freeze what registers', qr/Invalid argument/, sub { bpf_freeze(bpf_open("$MIRROR_DIR/register")); 1 });
refused('postgres', 'freeze the claims in use', qr/busy/, sub { bpf_freeze(bpf_open("$MIRROR_DIR/claims")); 1 });

my $status = as_other_do('postgres', sub { `$command status` });
like($status, qr/^slots: \d+ used of 100$/m, 'postgres: schedmirror status');
is(status($node, 'source, slots_total'), 'bpf|100', 'and all that time the mirror was in use');
is( $node->safe_psql('postgres', "SELECT state FROM adaptive_lwlock_backends WHERE pid = pg_backend_pid()"),
	'on_cpu', 'and true');

# What they can freeze: an array that nobody has mapped. It is seen, said and replaced.
my $good = 'SELECT source, slots_total FROM adaptive_lwlock_status()';
for my $what ('notes', 'claims')
{
	my $log = -s $node->logfile;
	$node->stop if $what eq 'claims';
	is(as_other_do('postgres', sub { bpf_freeze(bpf_open("$MIRROR_DIR/$what")); 'frozen' }), 'frozen', "postgres: freezes the $what");
	like((as_root($command, 'status'))[1], qr/^not usable: \S*$what is frozen.*schedmirror load/, "frozen $what: schedmirror status says so");
	if ($what eq 'claims')
	{
		$node->append_conf('postgresql.conf', "adaptive_lwlock.sched_state = 'bpf'");
		$node->start;
		like(status($node, 'source_reason'), qr/claims is frozen.*schedmirror load/, "frozen $what: the server's status as well");
		like(slurp_file($node->logfile, $log), qr/Not bpf: .*claims is frozen/, "frozen $what: and its log");
	}
	like(mirror('load'), qr/removed the mirror .* whose $what were frozen\n.*with 100 slots for group postgres/, "frozen $what: load replaces the mirror");
	wait_until($node, $good, 'bpf|100', "frozen $what: the server uses the new one");
}
$node->stop;
mirror('unload');
done_testing();
