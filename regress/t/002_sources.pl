# Which source keeps the mirror: what the setting asks for, what is there, and what the server's user may use.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('sources', conf => "adaptive_lwlock.sched_state = 'off'");
is(status($node, 'active, source, slots_used, slots_total'), 't|off|0|0', 'off: active without a mirror');
run_load($node, 'off: works', sql => 'SELECT lock_generator_run(200, 200)', clients => 4, seconds => 2);

sub restart_with
{
	my ($setting) = @_;
	$node->adjust_conf('postgresql.conf', 'adaptive_lwlock.sched_state', "'$setting'");
	$node->restart;
}

# Without the kernel's mirror.
restart_with('rseq');
is(status($node, 'active, source, slots_used > 0, source_reason IS NULL'), 't|rseq|t|f', 'rseq');
restart_with('auto');
is(status($node, 'active, source'), 't|rseq', 'auto falls back to rseq');
like(status($node, 'source_reason'), qr/schedmirror load/, 'and says what to do for bpf');
restart_with('bpf');
is(status($node, 'active, source, slots_total'), 't|off|0', 'bpf: never something else');
like(status($node, 'source_reason'), qr/schedmirror load/, 'and says what to do');
run_load($node, 'bpf without a mirror: works', sql => 'SELECT lock_generator_run(200, 200)', clients => 4, seconds => 2);

SKIP:
{
	skip 'the kernel keeps no mirror: ' . why_no_bpf(), 11 if why_no_bpf();

	mirror('load');
	for my $setting ('auto', 'bpf')
	{
		restart_with($setting);
		is(status($node, 'active, source, source_reason IS NULL, slots_used > 0'), 't|bpf|t|t', "$setting with a mirror");
	}
	restart_with('rseq');
	is(status($node, 'source'), 'rseq', 'rseq although there is a mirror');
	restart_with('off');
	is(status($node, 'source'), 'off', 'off although there is a mirror');

	# The server's user is outside the group that may use the mirror.
	mirror('unload');
	mirror('load', '--group', 'root');
	restart_with('auto');
	is(status($node, 'active, source'), 't|rseq', 'without the right to the mirror: rseq');
	like(status($node, 'source_reason'), qr/permission|group/i, 'the reason is the missing right');
	run_load($node, 'without the right: works', sql => 'SELECT lock_generator_run(200, 200)', clients => 4, seconds => 2);
	mirror('unload');

	# Fewer slots than backends: those that got none work without.
	mirror('load', '--slots', '8');
	restart_with('auto');
	my $load = start_load($node, sql => 'SELECT lock_generator_run(200, 200)', clients => 16, seconds => 4);
	wait_until($node, "SELECT count(*) FILTER (WHERE slot IS NULL) > 0 AND count(slot) > 0 FROM adaptive_lwlock_backends",
		't', 'more backends than slots: some have none');
	is(status($node, 'active, source'), 't|bpf', 'the mirror is used nevertheless');
	finish_load($load, 'out of slots: works');
	like(slurp_file($node->logfile), qr/runs without a slot in the mirror.*\n.*all 8 slots of the mirror are taken/, 'and the log says so');
	mirror('unload');
}

# A value that the setting does not have: refused as PostgreSQL refuses it for settings of modules.
my ($exit, undef, $err) = $node->psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.sched_state = 'magic'");
like($err, qr/invalid value for parameter "adaptive_lwlock.sched_state": "magic"/, 'an unknown value is refused');
like($err, qr/Available values: auto, bpf, rseq, off/, 'and the hint names the values');
restart_with('magic');
like(slurp_file($node->logfile), qr/invalid value for parameter "adaptive_lwlock.sched_state": "magic"/,
	'in the configuration file: the log says so');
is($node->safe_psql('postgres', 'SHOW adaptive_lwlock.sched_state'), 'auto', 'and the default is in force');
$node->stop;

# More processes than the rseq source has slots: it serves nobody, and says so.
$node->append_conf('postgresql.conf', <<'CONF');
adaptive_lwlock.sched_state = 'rseq'
max_connections = 65600
max_locks_per_transaction = 10
max_pred_locks_per_transaction = 10
CONF
$node->start;
is(status($node, 'active, source, slots_total'), 't|off|0', 'more processes than slots: active without a mirror');
like(status($node, 'source_reason'), qr/source rseq: this server may have 65\d\d\d processes, .* at most 65534: lower max_connections/, 'and says why');
like(slurp_file($node->logfile), qr/WARNING: .*source rseq is not available: this server may have 65\d\d\d processes/, 'the log says so');
run_load($node, 'more processes than slots: works', sql => 'SELECT lock_generator_run(200, 200)', clients => 4, seconds => 1);
$node->stop;
done_testing();
