# An operator attaches uprobes to the replaced functions' entries, and static probes, and takes them off, while the server
# works. ADAPTIVE_ROUNDS sets how often all functions are probed (default: up to 50 times, in 12 s).
use strict;
use warnings;
use TestServer;
use Throughput;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => why_no_root() if why_no_root();
plan skip_all => 'bpftrace is not installed' if system('bpftrace --version >/dev/null 2>&1') != 0;

# Commits that wait for each other and for the disk, errors, WAL that is switched, and the generator's lock in both modes.
my $work = <<'SQL';
INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 5);
DO $$ BEGIN PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN NULL; END $$;
SELECT pg_switch_wal() WHERE random() < 0.02;
SELECT lock_generator_run(1000, 1000, 1, 30)
SQL
my $conf = "fsync = on\nmax_wal_size = 10GB";

mirror('load') unless why_no_bpf();
my $node = new_server('uprobe', conf => $conf);
$node->safe_psql('postgres', 'CREATE TABLE t (v text)');
my $postgres = $node->config_data('--bindir') . '/postgres';

# ---- uprobes and uretprobes: each call adds to the count, and a return needs the stack as the entry left it ----

# Where a function lies in the file: its address less that of the segment it is in.
my @segments = map { /LOAD\s+(0x\w+) (0x\w+) \S+ (0x\w+)/ ? [ map { hex } $1, $2, $3 ] : () } `readelf -lW $postgres`;
my %offset_of;
for (`nm -D --defined-only $postgres`)
{
	my ($address, $name) = /^(\w+) T (LWLock(?:Acquire|ConditionalAcquire|AcquireOrWait|WaitForVar|UpdateVar|Release|ReleaseClearVar|ReleaseAll|HeldByMe|AnyHeldByMe|HeldByMeInMode|Disown|ReleaseDisowned)|ForEachLWLockHeldByMe)$/
	  or next;
	$address = hex $address;
	my ($segment) = grep { $address >= $_->[1] && $address < $_->[1] + $_->[2] } @segments or die "$name is in no segment";
	$offset_of{$name} = $address - $segment->[1] + $segment->[0];
}
is(scalar keys %offset_of, status($node, 'functions_replaced'), 'every replaced function is found in the executable')
  or diag(join ' ', sort keys %offset_of);

my $load = start_endless_load($node, clients => 8, sql => $work);
my ($least, $most) = $ENV{ADAPTIVE_ROUNDS} ? ($ENV{ADAPTIVE_ROUNDS}) x 2 : (5, 50);
my ($tool) = map { "$_/attach_uprobes.pl" } grep { -e "$_/attach_uprobes.pl" } @INC;
my ($exit, $output) = as_root($^X, $tool, $postgres, $least, $most, 12, map { sprintf '%s=%x', $_, $offset_of{$_} } sort keys %offset_of);
my ($rounds) = $output =~ /^(\d+) rounds$/m;
cmp_ok($rounds // 0, '>=', $least, 'attached to every function at once and taken off: ' . ($rounds // 0) . ' times');
my %counted = map { /^(\w+) (\d+) (\d+)$/ ? ($1 => [ $2, $3 ]) : () } split /\n/, $output;
for my $function ('Acquire', 'ConditionalAcquire', 'AcquireOrWait', 'WaitForVar', 'UpdateVar', 'Release', 'ReleaseClearVar', 'ReleaseAll')
{
	my ($entries, $returns) = @{ $counted{"LWLock$function"} // [ 0, 0 ] };
	ok($entries > 0 && $returns > 0, "LWLock$function: entries and returns are counted") or diag($output);
}
is($node->safe_psql('postgres', 'SELECT 1'), 1, 'the server works after the probes are gone');

# As the operator does it.
($exit, $output) = as_root('timeout', '--kill-after=5', '60', 'bpftrace', '-e',
	join(' ', map { "uprobe:$postgres:$_ { \@entries[\"$_\"] = count(); } uretprobe:$postgres:$_ { \@returns[\"$_\"] = count(); }" } 'LWLockAcquire', 'LWLockRelease')
	  . ' interval:s:2 { exit(); }');
like($output, qr/\@entries\[$_\]: [1-9].*\@returns\[$_\]: [1-9]/s, "bpftrace: $_") for 'LWLockAcquire', 'LWLockRelease';

# ---- the server's static probes fire from the module as they do from a stock server ----

my $module = $node->config_data('--pkglibdir') . '/adaptive_lwlock.so';

# The sizes and signs of a probe's arguments; a constant has whatever type the compiler gives it.
sub argument_types
{
	my ($file) = @_;
	my (%types, $probe);
	for (`readelf -nW $file`)
	{
		$probe = $1 if /^\s*Name: (\w+)$/;
		next unless /^\s*Arguments: (.*)$/ && $probe =~ /^lwlock__/;
		my $types = join ' ', map { /^(-?\d+)@(?!\$)/ ? $1 : 'constant' } split ' ', $1;
		$types{"$probe: $types"} = 1 unless $types =~ /constant/;
	}
	return join "\n", sort keys %types;
}
is(argument_types($module), argument_types($postgres), 'static probes have the same arguments');

# What the given ones fire with: probe, tranche, mode. Ends after a time, or when the last of them has fired.
sub fired
{
	my ($file, $seconds, $last, @names) = @_;
	my (undef, $said) = as_root('timeout', '--kill-after=5', '90', 'bpftrace', '-e',
		join(' ', map {
			my ($mode, $end) = ($_ eq 'release' ? '' : ', arg1', $_ eq $last ? 'exit();' : '');
			"usdt:$file:postgresql:lwlock__$_ { \@${_}[str(arg0)$mode] = count(); $end }"
		} @names) . " interval:s:$seconds { exit(); }");
	return map { /^\@(\w+)\[(.*)\]: [1-9]/ ? ("$1 $2" => 1) : () } split /\n/, $said;
}

# 0 is exclusive, 1 shared.
my @expected = (
	map({ ("$_ lock_generator, 0", "$_ lock_generator, 1") } 'acquire', 'wait__start', 'wait__done'), 'release lock_generator',
	'acquire__or__wait WALWrite, 0', 'acquire__or__wait__fail WALWrite, 0', 'wait__start WALWrite, 0', 'wait__done WALWrite, 0',
	'wait__start WALInsert, 0', 'wait__done WALInsert, 0', 'condacquire ProcArray, 0');
sub fires_as_expected
{
	my ($node, $who, $file) = @_;
	my $load = start_endless_load($node, clients => 8, sql => $work);
	my %fired = fired($file, 4, '', 'acquire', 'release', 'wait__start', 'wait__done', 'condacquire', 'acquire__or__wait', 'acquire__or__wait__fail');
	end_load($load, "$who: a load under static probes");

	# Rare, but in a flood of commits one soon meets another on its way out.
	local $ENV{PGOPTIONS} = '-c synchronous_commit=off';
	$load = start_endless_load($node, clients => 16, sql => 'SELECT pg_current_xact_id()');
	%fired = (%fired, fired($file, 30, 'condacquire__fail', 'condacquire__fail'));
	end_load($load, "$who: a load of commits");

	ok($fired{$_}, "$who: lwlock__$_") for @expected;
	ok((grep { /^condacquire__fail \w+, 0$/ } keys %fired), "$who: lwlock__condacquire__fail");
	# A name whose page the process has not touched yet reads as nothing: a tracer cannot wait for the page.
	my @strange = grep { !/^release [\w:]*$/ && !/^\w+ [\w:]*, [01]$/ } keys %fired;
	is("@strange", '', "$who: nothing else than tranches and modes");
	return;
}
end_load($load, 'the load did not notice');
fires_as_expected($node, 'module', $module);
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
is(status($node, 'active'), 't', 'the module is active');

my $stock = PostgreSQL::Test::Cluster->new('stock');
$stock->init;
$stock->append_conf('postgresql.conf', "$conf\nshared_preload_libraries = 'lock_generator'");
$stock->start;
$stock->safe_psql('postgres', 'CREATE EXTENSION lock_generator; CREATE TABLE t (v text)');
fires_as_expected($stock, 'stock', $postgres);
$stock->stop;

# A server that starts while the probe is attached.
my $pid = fork() // die "fork: $!";
if (!$pid)
{
	as_root('timeout', '20', 'bpftrace', '-e', "uprobe:$postgres:LWLockAcquire { \@ = count(); } interval:s:12 { exit(); }");
	POSIX::_exit(0);
}
sleep 4;
$node->restart;
like(status($node, 'active, reason IS NOT NULL'), qr/^(t\|f|f\|t)$/, 'started under a probe: active, or stock with a reason');
run_load($node, 'started under a probe: works', clients => 4, seconds => 3, sql => 'SELECT lock_generator_run(1000, 1000)');
waitpid $pid, 0;
run_load($node, 'the probe is gone: works', clients => 4, seconds => 2, sql => 'SELECT lock_generator_run(1000, 1000)');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
done_testing();
