# What lies where the mirror should be is none, is another version's, or may not be opened; and what was open is locked away
# later. The server works, says why it has no mirror, and takes a good one as soon as there is one.
use strict;
use warnings;
use TestServer;
use RawBpf;
use Throughput;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'the kernel keeps no mirror: ' . why_no_bpf() if why_no_bpf();

my $node = new_server('unusable', conf => "adaptive_lwlock.sched_state = 'bpf'");
my $load = start_endless_load($node, sql => 'SELECT lock_generator_stress(500, 50), pg_sleep(0.01)', clients => 4);

# Source and reason as a process sees them that has just looked for the mirror: it looks when a transaction ends.
sub source { return $node->safe_psql('postgres', "SELECT 1;\nSELECT source || ': ' || coalesce(source_reason, '') FROM adaptive_lwlock_status()") =~ s/^1\n//r; }

# Puts another map or program in the place of a pinned one, open to the group.
sub put
{
	my ($name, $fd) = @_;
	unlink $name;
	bpf_pin($fd, $name);
	chown 0, scalar getgrnam('postgres'), $name or die "chown $name: $!";
	chmod 0660, $name or die "chmod $name: $!";
	return;
}

# An array of slots whose header is right but for what is given.
sub slots
{
	my (%but) = (value_size => 64, elements => 101, @_);
	my $fd = bpf_create_array($but{value_size}, $but{elements}, $but{flags});
	bpf_update($fd, 0, mirror_header(slots => $but{elements}, %but) . "\0" x ($but{value_size} - 64)) if $but{value_size} >= 64;
	return $fd;
}

my $nothing = qr/no mirror at .*schedmirror load/;
my $not_ours = qr/no mirror of a known layout: reload/;
my @cases = (
	'an older version' => sub { put('slots', slots(version => 0)) } => qr/layout version 0, this program knows 2: reload/,
	'a newer version' => sub { put('slots', slots(version => 3)) } => qr/layout version 3, this program knows 2: reload/,
	'switched off' => sub { put('slots', slots(active => 0)) } => qr/has been unloaded/,
	'another magic number' => sub { put('slots', slots(magic => 0x7363684e)) } => $not_ours,
	'zeros' => sub { put('slots', bpf_create_array(64, 101)) } => $not_ours,
	'larger slots' => sub { put('slots', slots(value_size => 128)) } => $not_ours,
	'smaller slots' => sub { put('slots', slots(value_size => 32)) } => $not_ours,
	'no slot but the header' => sub { put('slots', slots(elements => 1)) } => $not_ours,
	'more slots than numbers' => sub { put('slots', slots(elements => 65_536)); put('claims', bpf_create_array(64, 65_536)) } => $not_ours,
	'fewer claims than slots' => sub { put('claims', bpf_create_array(64, 100)) } => $not_ours,
	'more claims than slots' => sub { put('claims', bpf_create_array(64, 102)) } => $not_ours,
	'larger claims' => sub { put('claims', bpf_create_array(128, 101)) } => $not_ours,
	'slots that cannot be mapped' => sub { put('slots', slots(flags => 0)) } => $not_ours,
	'claims that cannot be mapped' => sub { put('claims', bpf_create_array(64, 101, 0)) } => $not_ours,
	'claims that cannot be written' => sub { my $fd = bpf_create_array(64, 101); bpf_freeze($fd); put('claims', $fd) } => qr/claims is frozen.*schedmirror load/,
	'a hash for the slots' => sub { put('slots', bpf_create_hash(4, 64, 101)) } => $not_ours,
	'an array for the registering program' => sub { put('register', bpf_create_array(8, 101)) } => $not_ours,
	'a program for the slots' => sub { put('slots', bpf_open('deactivate')) } => $not_ours,
	'another program for it' => sub { put('register', bpf_open('deactivate')) } => $not_ours,
	'a program of another kind' => sub { put('register', bpf_program_of_link('sched_switch')) } => $not_ours,
	'a program for the claims' => sub { put('claims', bpf_program_of_link('sched_switch')) } => $not_ours,
	'a link for the slots' => sub { put('slots', bpf_open('sched_switch')) } => qr/./,
	'no slots' => sub { unlink 'slots' } => $nothing,
	'no claims' => sub { unlink 'claims' } => $nothing,
	'no registering program' => sub { unlink 'register' } => $nothing,
	'a directory for the slots' => sub { unlink 'slots'; mkdir 'slots' } => qr/may not open|cannot open/,
	'a loop of links for the claims' => sub { unlink 'claims'; symlink 'claims', 'claims' } => qr/cannot open/,
	'slots of root alone' => sub { chmod 0600, 'slots' } => qr/may not open .*slots: join the group/,
	'claims of root alone' => sub { chmod 0600, 'claims' } => qr/may not open .*claims: join the group/,
	'a registering program of root alone' => sub { chmod 0600, 'register' } => qr/may not open .*register: join the group/,
	'claims to read only' => sub { chmod 0440, 'claims' } => qr/may not open .*claims: join the group/,
	'another group' => sub { chown 0, 0, '.' } => qr/may not open .*slots: join the group/,
	'a directory of root alone' => sub { chmod 0700, '.' } => qr/may not open .*slots: join the group/,
);

# Made elsewhere, of the pieces of a good one: not for a moment may the server find that.
my ($good, $made) = ("${MIRROR_DIR}_good", "${MIRROR_DIR}_made");
sub place
{
	my ($code) = @_;
	as_root_do(
		sub {
			my $group = getgrnam('postgres');
			mkdir $made, 0750 or die "mkdir: $!";
			chown 0, $group, $made;
			chdir $made or die "chdir: $!";
			for my $name ('slots', 'claims', 'register', 'deactivate', 'sched_switch') { put($name, bpf_open("$good/$name")); }
			$code->();
			rename $made, $MIRROR_DIR or die "rename: $!";
		});
	return;
}

mirror('load', '--slots', 100, '--dir', $good);
like(source(), qr/^off: $nothing/, 'no mirror at all');
while (my ($name, $code, $reason) = splice @cases, 0, 3)
{
	place($code);
	like(source(), qr/^off: .*$reason/, $name);
	as_root_do(sub { rmdir "$MIRROR_DIR/slots"; unlink glob "$MIRROR_DIR/*"; rmdir $MIRROR_DIR or die "rmdir: $!"; });
}
mirror('unload', '--dir', $good);

# As soon as there is a good one, it is used, by the sessions that are there already as well.
my $clients = <<'SQL';
SELECT count(*), count(slot) FROM pg_stat_activity LEFT JOIN adaptive_lwlock_backends USING (pid) WHERE query LIKE 'SELECT lock_generator%'
SQL
mirror('load', '--slots', 100, '--group', 'root');
like(source(), qr/^off: .*may not open .*: join the group/, 'loaded for another group');
as_root_do(sub { chown 0, scalar getgrnam('postgres'), $MIRROR_DIR, glob("$MIRROR_DIR/*") });
wait_until($node, $clients, '4|4', 'given to the group: every client is registered');
is(source(), 'bpf: ', 'the source is bpf');

end_load($load, 'the load goes on through all this');

# What the server had open when it started stays open for all its processes.
$node->restart;
$load = start_endless_load($node, sql => 'SELECT lock_generator_stress(500, 50), pg_sleep(0.01)', clients => 4);
wait_until($node, $clients, '4|4', 'started with it: every client is registered');
as_root_do(sub { chmod 0, glob("$MIRROR_DIR/*"), $MIRROR_DIR; chown 0, 0, glob("$MIRROR_DIR/*"), $MIRROR_DIR });
is($node->safe_psql('postgres', $clients), '4|4', 'locked away meanwhile: the clients keep their slots');
is(source(), 'bpf: ', 'and the source is bpf');
run_load($node, 'new sessions work', sql => 'SELECT lock_generator_stress(2000, 50)', clients => 4, transactions => 20);
is($node->safe_psql('postgres', 'SELECT count(slot) FROM adaptive_lwlock_backends WHERE pid = pg_backend_pid()'), 1, 'and are registered');
end_load($load, 'the load goes on');

# But not for a server that starts then.
for my $setting ('bpf: off', 'auto: rseq')
{
	my ($asked, $got) = split /: /, $setting;
	$node->adjust_conf('postgresql.conf', 'adaptive_lwlock.sched_state', "'$asked'");
	$node->restart;
	like(source(), qr/^$got: .*may not open .*: join the group/, "started when it is locked away, source $asked: $got");
	like(slurp_file($node->logfile), qr/source "$got"\n.*Not bpf: .*may not open/, 'and the log says so');
	run_load($node, 'works', sql => 'SELECT lock_generator_stress(2000, 50)', clients => 4, transactions => 20);
}
is($node->safe_psql('postgres', 'SELECT exclusive = value FROM lock_generator_stress_totals()'), 't', 'no update is lost');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
mirror('unload');
done_testing();
