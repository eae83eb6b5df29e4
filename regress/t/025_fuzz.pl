# Nonsense on schedmirror's command line, in the settings and in the arguments of the SQL functions: a clear error, or a value in
# range, and everything goes on. FUZZ_SEED repeats a run, FUZZ_ROUNDS makes it longer.
use strict;
use warnings;
use TestServer;
use RawBpf;
use PostgreSQL::Test::Utils;
use Test::More;
use POSIX ();

my $seed = $ENV{FUZZ_SEED} // 20_261_121;
my $rounds = $ENV{FUZZ_ROUNDS} // 1;
srand $seed;
note("FUZZ_SEED=$seed FUZZ_ROUNDS=$rounds");
sub pick { return $_[ int rand @_ ]; }

# ---- values ----

my @numbers = (
	qw(0 1 2 -1 -0 +5 00012 65533 65534 65535 65536 99999 100000 100001 2147483647 2147483648 -2147483648 -2147483649 4294967295
	  4294967296 9223372036854775807 9223372036854775808 18446744073709551616 1e3 1e400 0x10 0b1 1.5 1.4999 .5 1, 1_000 NaN inf -inf),
	' 5', '5 ', '5us', '5 us', '5ms', '1s', '1 min', '1kB', '1MB', '10%', '1' x 400);
my @texts = (
	'', ' ', 'owner', 'OWNER', ' park', 'blind ', 'auto', 'bpf', 'rseq', 'off', 'on', 'none', 'default', 'null', '%s%n%x', '$(id)', '`id`',
	"'", '"', '\\', "''; DROP TABLE x; --", '-', '--', "a\nb", "\r\n", "\t", '../..', '/', 'x' x 5_000, "\xc3\xa4\xe2\x82\xac", "\xf0\x9f\x90\x98" x 50,
	"\xd9\xa3", "o\xcc\x88wner", "owner\xe2\x80\x8b", "\x01\x02\x7f");

# Some random bytes, none of them NUL; `as UTF-8` where the server would refuse others anyway.
sub bytes { return join '', map { chr(1 + int rand 255) } 1 .. 1 + int rand 40; }
sub utf8 { my $text = join '', map { chr(pick(32 + int rand 95, 0xa1 + int rand 0x500, 0x1f400 + int rand 100)) } 1 .. 1 + int rand 30; utf8::encode($text); return $text; }

# ---- schedmirror ----

my $command = $ENV{SCHEDMIRROR} // 'schedmirror';

# What lies in the BPF file system.
sub pinned { return join ' ', map { (-d $_ ? "$_/" : $_, sprintf('%o', (stat)[2] // 0)) } sort glob('/sys/fs/bpf /sys/fs/bpf/* /sys/fs/bpf/*/*'); }

# Runs it with the given arguments. Returns what is wrong with what it did, or nothing.
sub misbehaves
{
	my (@arguments) = @_;
	my $before = pinned();
	my $pid = open(my $pipe, '-|') // die "fork: $!";
	if (!$pid)
	{
		open(STDERR, '>&', \*STDOUT);
		open(STDOUT, '>', '/dev/null');
		exec { $command } $command, @arguments or POSIX::_exit(127);
	}
	my $said = do { local $/; <$pipe> } // '';
	close $pipe;
	$said = substr($said, 0, 200) . "...\n" if length $said > 300;
	my ($signal, $exit) = ($? & 127, $? >> 8);
	return "killed by signal $signal" if $signal;
	return "exit code $exit" if $exit > 3;
	if ($exit == 0)
	{
		# Whatever it loaded where it was told to is taken out by the same words.
		my ($dir) = grep { /^--dir/ } map { $_ eq '--dir' ? () : $_ } @arguments;
		for my $i (grep { $arguments[$_] eq '--dir' } 0 .. $#arguments - 1) { $dir = "--dir=$arguments[$i + 1]"; }
		IPC::Run::run([ $command, 'unload', $dir // () ], '>', '/dev/null', '2>', '/dev/null');
	}
	elsif ($exit != 3)
	{
		return "exit code $exit, but said: $said" if $said !~ /\Aschedmirror: [^\n]+\n\z/ && !grep { /^--v/ } @arguments;
	}
	return pinned() eq $before ? '' : "left $before as " . pinned();
}

my @options = ('--slots', '--group', '--dir', '--verbose', '--help', '--slots=', '--group=', '--dir=', '-s', '-', '--', '--s', '--x', '-h');
my @commands = ('load', 'unload', 'status', 'Load', 'loa', 'load ', 'reload', '');

sub random_arguments
{
	my @arguments;
	for (1 .. 1 + int rand 5)
	{
		push @arguments, pick(
			sub { pick(@commands) }, sub { pick(@commands[ 0 .. 2 ]) }, sub { pick(@options) }, sub { pick(@options) . pick(@numbers, @texts) },
			sub { pick(@numbers) }, sub { pick(@texts) }, sub { bytes() },
			sub { '/sys/fs/bpf/' . pick('f', 'f/', 'f/g', '.', '..', 'a.b', '', 'x' x 200, 'x' x 300, 'x' x 5_000, "f\n", '-') })->();
	}
	return @arguments;
}

SKIP:
{
	skip 'schedmirror loads only as root: ' . why_no_bpf(), 3 if why_no_bpf();

	# With one wrong word each, so that nothing else refuses them.
	my $sensible = sub {
		my ($option, @values) = @_;
		return grep { $_ } map { my $wrong = misbehaves('load', $option, $_, $option eq '--group' ? () : ('--group', 'root')); $wrong ? $option . ' ' . substr($_, 0, 100) . ": $wrong" : '' } @values;
	};
	is(as_root_do(sub { join "\n", $sensible->('--slots', @numbers, @texts) }), '', 'schedmirror load --slots with any value');
	is( as_root_do(sub { join "\n", $sensible->('--group', @numbers, @texts, map { bytes() } 1 .. 20) }),
		'', 'schedmirror load --group with any value');
	my @dirs = map { ($_, "/sys/fs/bpf/$_", "/sys/fs/bpf/$_/", "/sys/fs/bpf/none/$_") } @texts, '.', '..', 'a.b', 'x' x 200, 'x' x 300;
	is(as_root_do(sub { join "\n", $sensible->('--dir', @dirs, map { "/sys/fs/bpf/" . bytes() } 1 .. 20) }), '', 'schedmirror load --dir with any value');

	is( as_root_do(
			sub {
				my @wrong;
				for (1 .. 200 * $rounds)
				{
					my @arguments = random_arguments();
					my $wrong = misbehaves(@arguments);
					push @wrong, join(' ', map { '[' . substr($_, 0, 100) . ']' } @arguments) . ": $wrong" if $wrong;
				}
				join "\n", @wrong;
			}),
		'',
		'schedmirror with random arguments');
	mirror('load', '--slots', 100);
}

# ---- settings ----

my $node = new_server('fuzz');
my $alive = sub { my ($name) = @_; is(status($node, 'active, reason IS NULL'), 't|t', "$name: the server is up, the module active"); return; };
my $started = $node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()');
sub quoted { my ($text) = @_; $text =~ s/'/''/g; return "'$text'"; }

my @values = (@numbers, @texts, map { utf8() } 1 .. 100 * $rounds);
$node->safe_psql('postgres', 'CREATE TABLE value (v text); CREATE TABLE outcome (name text, v text, state text, setting text)');
$node->safe_psql('postgres', 'SET standard_conforming_strings = on; INSERT INTO value VALUES ' . join ', ', map { '(' . quoted($_) . ')' } @values);
$node->safe_psql('postgres', <<'SQL');
DO $$
DECLARE
	n text;
	value text;
	state text;
BEGIN
	FOR n, value IN SELECT name, v FROM pg_settings, value WHERE name LIKE 'adaptive\_lwlock.%' LOOP
		BEGIN
			PERFORM set_config(n, value, false);
			state := 'set';
		EXCEPTION WHEN OTHERS THEN
			state := SQLSTATE;
		END;
		INSERT INTO outcome VALUES (n, value, state, current_setting(n));
	END LOOP;
END $$;
SQL
is($node->safe_psql('postgres', "SELECT count(DISTINCT state) FROM outcome WHERE state = 'set'"), 1, 'some values can be set');
is( $node->safe_psql('postgres', <<'SQL'), '', 'settings: what is refused is refused for its value, what is taken is in range');
SELECT * FROM outcome
WHERE state NOT IN ('set', '22023', '55P02')
	OR (name = 'adaptive_lwlock.mode' AND setting NOT IN ('owner', 'blind', 'park'))
	OR (name = 'adaptive_lwlock.max_spin' AND setting::int NOT BETWEEN 0 AND 100000)
	OR (name = 'adaptive_lwlock.sched_state' AND (state = 'set' OR setting <> 'auto'))
SQL
$alive->('SET');

# By way of ALTER SYSTEM, of a session's start, and of the configuration file.
my @names = map { "adaptive_lwlock.$_" } 'mode', 'max_spin', 'sched_state', 'no_such', '';
my %exits;
for my $value (map { pick(@values, map { bytes() } 1 .. 50) } 1 .. 20 * $rounds)
{
	my $name = pick(@names[ 0 .. 2 ]);
	my ($exit, undef, $said) = $node->psql('postgres', "ALTER SYSTEM SET $name = " . quoted($value) . ";\nALTER SYSTEM RESET $name");
	$exits{$exit}++;
	fail("ALTER SYSTEM SET $name = $value: $said") if $exit != 0 && $said !~ /^psql:<stdin>:\d+: ERROR: /m;
	(my $option = "-c " . pick(@names) . "=$value") =~ s/([\\ \t\r\n])/\\$1/g;
	local $ENV{PGOPTIONS} = $option;
	($exit, undef, $said) = $node->psql('postgres', 'SELECT 1');
	$exits{$exit}++;
	fail("PGOPTIONS=$option: $said") if $exit != 0 && $said !~ /FATAL: /;
}
is(join(' ', grep { !/^[023]$/ } keys %exits), '', 'ALTER SYSTEM and a session\'s start: done or refused');
$alive->('ALTER SYSTEM and a session\'s start');

my $conf = $node->data_dir . '/postgresql.conf';
my $sane = slurp_file($conf);
sub write_conf { my ($text) = @_; open(my $file, '>:raw', $conf) or die "$conf: $!"; print $file $text; close $file or die; return; }
for (1 .. 10 * $rounds)
{
	write_conf($sane . join '', map { pick(@names) . pick(' = ', '=', ' ') . pick(quoted(pick(@values)), pick(@values), bytes()) . "\n" } 1 .. 5);
	$node->reload;
	$node->safe_psql('postgres', 'SELECT 1');
}
$alive->('a configuration file full of nonsense');
is($node->safe_psql('postgres', "SELECT current_setting('adaptive_lwlock.max_spin')::int BETWEEN 0 AND 100000"), 't', 'and the settings are in range');

# At the start the server refuses a file that it cannot read, but not a value that the module does not know.
for my $round (1 .. 3 * $rounds)
{
	my @lines = map { $_ . ' = ' . quoted(pick(grep { !/[\r\n\\\x80-\xff]/ && length($_) < 500 } @numbers, @texts)) . "\n" } @names[ 0 .. 2 ];
	write_conf($sane . join '', @lines);
	$node->restart;
	is($node->safe_psql('postgres', "SELECT active, mode IN ('owner', 'blind', 'park'), current_setting('adaptive_lwlock.max_spin')::int BETWEEN 0 AND 100000 FROM adaptive_lwlock_status()"),
		't|t|t', "started with nonsense in the file, round $round")
	  or diag(@lines);
}
write_conf($sane);
$node->restart;
$started = $node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()');

# ---- SQL functions ----

my @functions = ('adaptive_lwlock_status', 'adaptive_lwlock_backends', 'pg_stat_adaptive_lwlock', 'pg_stat_adaptive_lwlock_reset');
my @integers = (-2147483648, -1, 0, 1, 100, 101, 1_000_000_000, 2147483647, 'NULL');
my @floats = (-1, 0, 1e-300, 1, 60_000, 60_001, 1e300, "'NaN'", "'inf'", "'-inf'", 'NULL');
my @calls = (
	(map { ("SELECT $_()", "SELECT * FROM $_()", "SELECT $_(), $_() FROM generate_series(1, 3)", "SELECT $_(NULL)", "SELECT $_(1, 2)", "SELECT ($_()).*",
		"SELECT * FROM $_() WITH ORDINALITY LIMIT 1", "SELECT * FROM $_() AS t(a int)", "SELECT * FROM generate_series(1, 3), LATERAL $_() f", "CALL $_()",
		"SELECT count(*) FROM generate_series(1, 1000) i WHERE $_() IS NULL", "CREATE TEMP TABLE f_$_ AS SELECT * FROM $_()",
		"BEGIN; DECLARE c SCROLL CURSOR FOR SELECT * FROM $_(); FETCH 2 FROM c; FETCH BACKWARD 1 FROM c; MOVE LAST IN c; COMMIT",
		"DO \$\$ DECLARE r record; BEGIN FOR r IN SELECT * FROM $_() LOOP EXIT; END LOOP; END \$\$", "SELECT CASE WHEN random() < 0 THEN $_() END") } @functions),
	"SELECT * FROM ROWS FROM (adaptive_lwlock_backends(), pg_stat_adaptive_lwlock(), adaptive_lwlock_status())",
	(map { 'SELECT lock_generator_run(' . join(', ', pick(@integers), pick(@integers), pick(@floats) . '::float8', map { pick(@integers) } 1 .. 5) . ')' } 1 .. 60 * $rounds),
	(map { 'SELECT lock_generator_stress(' . pick(-9223372036854775807, @integers, '9223372036854775807') . ', ' . pick(@integers) . ')' } 1 .. 20 * $rounds),
	'SELECT lock_generator_error()', 'SELECT lock_generator_stress(NULL, NULL)');
my $script = join '', map { "$_;\nROLLBACK;\n" } @calls;
my ($stdout, $stderr) = ('', '');
IPC::Run::run([ 'psql', '-XAtq', '-d', $node->connstr('postgres') ], '<', \"SET statement_timeout = 50;\n$script", '>', \$stdout, '2>', \$stderr, IPC::Run::timeout(120));
is(scalar(() = $stderr =~ /connection|server closed|FATAL|PANIC/g), 0, 'SQL functions with any arguments') or diag(substr($stderr, -2000));
$alive->('SQL functions');
is($node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()'), $started, 'the server never restarted');
run_load($node, 'and works', sql => 'SELECT lock_generator_stress(2000, 50)', clients => 4, transactions => 20);
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
done_testing();
