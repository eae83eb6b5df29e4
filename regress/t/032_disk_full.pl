# No space left on the device: for a relation an error that lets go of its locks, for WAL a crash as of a stock server; and
# with space the server works again.
use strict;
use warnings;

# File systems of the test's own, which nobody else sees and which vanish with it.
BEGIN
{
	if ($> == 0 && !$ENV{PRIVATE_MOUNTS})
	{
		my @private = ('unshare', '--mount', '--propagation', 'private');
		if (system("@private mount -t tmpfs none /mnt 2>/dev/null") == 0)
		{
			$ENV{PRIVATE_MOUNTS} = 1;
			exec(@private, $^X, (map { "-I$_" } @INC), $0) or die "exec: $!";
		}
	}
}

use TestServer;
use CrashTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

plan skip_all => why_no_root() if why_no_root();
plan skip_all => 'this system lets no file system be mounted' unless $ENV{PRIVATE_MOUNTS};

sub mount_tmpfs
{
	my ($size) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir();
	my ($exit, $output) = as_root('mount', '-t', 'tmpfs', '-o', "size=$size,mode=700,uid=$>", 'tmpfs', $dir);
	die "mount: $output" if $exit;
	return $dir;
}

my $wal = mount_tmpfs('128m');
my $data = mount_tmpfs('8m');
mirror('load') unless why_no_bpf();

# Enough WAL between two checkpoints to fill the file system.
my $node = new_server('full', init => { extra => [ '--data-checksums', '--wal-segsize=1', "--waldir=$wal/wal" ] }, conf => <<'CONF');
restart_after_crash = on
fsync = off
max_wal_size = 4GB
checkpoint_timeout = 1h
CONF
create_ledger($node);
my $source = status($node, 'source');
my ($entries, $clients) = (0, 4);

# ---- a relation ----

mkdir "$data/space" or die "$data/space: $!";
$node->safe_psql('postgres', "CREATE TABLESPACE small LOCATION '$data/space'");
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE big (id bigserial PRIMARY KEY, filling text) TABLESPACE small;
ALTER TABLE big ALTER filling SET STORAGE PLAIN;
CREATE SEQUENCE errors;
CREATE PROCEDURE fill() LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO big (filling) SELECT repeat('x', 3000) FROM generate_series(1, 20);
EXCEPTION WHEN disk_full THEN
    PERFORM nextval('errors');
END $$;
SQL
for my $mode ('owner', 'blind', 'park')
{
	set_mode($node, $mode);
	system("dd if=/dev/zero of=$data/filling bs=1M count=4 status=none");
	my $fill = start_load($node, clients => 6, seconds => 4, sql => 'CALL fill()');
	my $ledger = start_ledger($node, clients => $clients, seconds => 4);
	finish_load($fill, "$mode: backends run out of space and go on");
	my $acknowledged = finish_load($ledger, "$mode: others do not notice");
	cmp_ok($node->safe_psql('postgres', 'SELECT last_value FROM errors'), '>', 10, "$mode: there was an error each time");
	($entries, my @problems) = check_ledger($node, $entries, $acknowledged, 0);
	is("@problems", '', "$mode: nothing is lost");
	is($node->safe_psql('postgres', 'SELECT count(DISTINCT id) = count(*), count(*) % 20 FROM big'), 't|0', "$mode: no half insert");

	unlink "$data/filling";
	$node->safe_psql('postgres', "TRUNCATE big; SELECT setval('errors', 1)");
	run_load($node, "$mode: with space all is well", clients => 4, transactions => 10,
		sql => "INSERT INTO big (filling) SELECT repeat('x', 3000) FROM generate_series(1, 10)");
	is($node->safe_psql('postgres', 'SELECT count(*) FROM big'), 400, "$mode: and everything is there");
	$node->safe_psql('postgres', 'TRUNCATE big');
}
is(crashes($node, 0), '', 'no process crashed');
$node->safe_psql('postgres', 'DROP TABLE big; DROP TABLESPACE small');

# ---- WAL ----

for my $mode ('owner', 'blind', 'park')
{
	set_mode($node, $mode);
	my $log = -s $node->logfile;
	my $ledger = start_ledger($node, clients => $clients);
	$node->poll_query_until('postgres', "SELECT count(*) > $entries + 20 FROM history") or die 'the load does not start';
	# Last: what these have written by the time that it is full stays there, and recovery needs some space, too.
	my $writers = start_load($node, clients => 4, seconds => 60,
		sql => "SELECT pg_logical_emit_message(true, 'fill', repeat('x', 10000))");
	# 2 MB are left: fewer than the files that are ready for use may take, so the writers meet the limit.
	system("dd if=/dev/zero of=$wal/filling bs=64k count=\$((\$(df -k --output=avail $wal | tail -1) / 64 - 32)) status=none");
	my @problems;
	my $acknowledged = end_load($ledger) // push @problems, 'the load hangs';
	defined end_load($writers) or push @problems, 'the writers hang';
	push @problems, 'no PANIC' unless slurp_file($node->logfile, $log) =~ /PANIC: .*No space left on device/;

	# Recovery may have met the limit as well: then a stock server is down.
	unlink "$wal/filling";
	push @problems, 'the server does not come back' unless back();
	my $is = status($node, 'active, source, mode');
	push @problems, "status $is" if $is ne "t|$source|$mode";
	($entries, my @wrong) = check_ledger($node, $entries, $acknowledged, $clients);
	ok(!@problems && !@wrong, "$mode: a crash when there is no space for WAL, and recovery") or diag(join "\n", @problems, @wrong);
	my $more = run_load($node, "$mode: with space all is well", clients => 4, transactions => 20,
		sql => "INSERT INTO history (account, delta) VALUES (1, 0); SELECT lock_generator_run(200, 200)");
	$entries += $more;
	# Gives the space back that the log took.
	$node->safe_psql('postgres', 'CHECKPOINT');
}

# True when the server answers, by itself or after a start.
sub back
{
	for (1 .. 300)
	{
		if (!kill 0, $node->{_pid})
		{
			$node->_update_pid(-1);
			return $node->start(fail_ok => 1);
		}
		return 1 if answers($node);
		usleep(200_000);
	}
	return 0;
}

wait_until($node, <<'SQL', 't', 'no slot is lost');
SELECT slots_used <= (SELECT count(*) FROM adaptive_lwlock_backends) + 1 FROM adaptive_lwlock_status()
SQL
unlike(slurp_file($node->logfile), qr/TRAP|was terminated by signal (?!6: Aborted)|PANIC(?!.*No space left on device)/, 'nothing else crashed');
check_relations($node);
done_testing();
