# 64 clients with everything on, and connections that come and go: memory, file descriptors, slots and shared memory do not
# grow. SOAK_SECONDS sets how long (default 20; two hours: SOAK_SECONDS=7200 scripts/check t/015).
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);

my $seconds = $ENV{SOAK_SECONDS} // 20;
my $clients = 64;
mirror('load') unless why_no_bpf();
my $node = new_server('leaks', conf => <<'CONF');
shared_buffers = 64MB
max_wal_size = 512MB
autovacuum_naptime = 10s
max_connections = 120
CONF
$node->safe_psql('postgres', <<'SQL');
CREATE SEQUENCE s;
CREATE TABLE account AS SELECT generate_series(1, 1000) AS id, 0 AS balance;
ALTER TABLE account ADD PRIMARY KEY (id), SET (fillfactor = 50);
SQL
my $postmaster = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/ ? $1 : die;
my $source = status($node, 'source');

# What could grow, in kB or pieces: of the postmaster, of the backends that stay (the largest one), of the server.
sub measure
{
	my @backends = split /\n/, $node->safe_psql('postgres', <<'SQL');
SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND backend_start < now() - interval '3 s'
SQL
	my %sum = (backends => scalar @backends, backend_memory => 0, backend_files => 0);
	for my $pid (@backends)
	{
		my ($memory, $files) = memory_and_files($pid) or next;
		$sum{backend_memory} = $memory if $memory > $sum{backend_memory};
		$sum{backend_files} = $files if $files > $sum{backend_files};
	}
	@sum{ 'postmaster_memory', 'postmaster_files' } = memory_and_files($postmaster);
	# key shmid perms size cpid …
	$sum{shared_segments} = () = slurp_file('/proc/sysvipc/shm') =~ /^\s*\S+\s+\S+\s+\S+\s+\S+\s+$postmaster\s/mg;
	# Slots beyond those of the processes there are.
	$sum{stray_slots} = status($node, 'slots_used') - $node->safe_psql('postgres', 'SELECT count(slot) FROM adaptive_lwlock_backends');
	return \%sum;
}

# A backend maps a file for each of its slots' arrays, so mappings count as files do.
sub memory_and_files
{
	my ($pid) = @_;
	my $status = eval { slurp_file("/proc/$pid/status") } or return;
	my ($anonymous) = $status =~ /^RssAnon:\s+(\d+) kB/m or return;
	opendir(my $dir, "/proc/$pid/fd") or return;
	my $descriptors = grep { !/^\./ } readdir $dir;
	my $bpf_mappings = () = (eval { slurp_file("/proc/$pid/maps") } // '') =~ /bpf/g;
	return ($anonymous, $descriptors + $bpf_mappings);
}

my $transaction = join "; ", 'SELECT nextval($$s$$)',
  "UPDATE account SET balance = balance + 1 WHERE id = 1 + (random() * 999)::int",
  'SELECT lock_generator_run(200, 200, 0.05, 20)';
my $load = start_load($node, clients => $clients, seconds => $seconds, sql => $transaction);

# New connections all the time: each takes a slot and gives it back.
my $churn_script = PostgreSQL::Test::Utils::tempdir() . '/churn.sql';
append_to_file($churn_script, "SELECT nextval('s');\n");
my $churn_out = '';
my $churn = IPC::Run::start(
	[ 'pgbench', '-n', '-C', '-c', '4', '-T', $seconds, '-f', $churn_script, '-h', $node->host, '-p', $node->port, 'postgres' ],
	'<', \undef, '>&', \$churn_out);

# The first fifth warms the caches up.
my ($start, $last_note) = (time, 0);
my ($before, $after, $samples) = (undef, undef, 0);
while (time - $start < $seconds - 4)    # and towards the end they leave, between one question and the next
{
	sleep 1;
	$load->{run}->pump_nb;
	$churn->pump_nb;
	next if time - $start < 4 + $seconds / 5;
	my $now = measure();
	next if $now->{backends} < $clients;    # not all are there yet, or not any more
	$samples++;
	$after = $now;
	$before //= $now;
	next if time - $last_note < 60;
	$last_note = time;
	note(sprintf('%5d s: ', time - $start), join ', ', map { "$_ $after->{$_}" } sort keys %$after);
}
my $transactions = finish_load($load, "$clients clients for $seconds s", 60);
$churn->finish;
my ($connections) = $churn_out =~ /number of transactions actually processed: (\d+)/;
note("$transactions transactions, " . ($connections // 0) . ' connections');
cmp_ok($connections // 0, '>', 10, 'connections came and went');

cmp_ok($samples, '>=', $seconds / 10, 'all the backends that stayed were looked at, more than once');
my %may_grow = (
	backend_memory => 1024, postmaster_memory => 256,    # kB; the first is catalogue caches and the heap's fragments
	backend_files => 4, shared_segments => 0,
	postmaster_files => 2,    # a connection that it is just handing on
	stray_slots => 8,    # processes that came or went between the two questions
);
cmp_ok($after->{$_}, '<=', $before->{$_} + $may_grow{$_}, "$_: $before->{$_} -> $after->{$_}") for sort keys %may_grow;
wait_until($node, <<'SQL', 't', 'every slot came back');
SELECT slots_used <= (SELECT count(*) FROM adaptive_lwlock_backends) + 1 FROM adaptive_lwlock_status()
SQL
is(status($node, 'active, source'), "t|$source", 'active, with the same source');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
done_testing();
