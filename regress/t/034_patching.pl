# Where functions of the server cannot be replaced, it is a stock server that says why: the kernel denies it, /proc is hidden,
# another module was there first. One that comes later does no harm.
use strict;
use warnings;
use TestServer;
use CrashTest;
use OtherServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use POSIX ();

mirror('load') unless why_no_bpf();
my $node = new_server('patching', conf => "restart_after_crash = on\nfsync = off\n");
$node->stop;

# ---- the kernel denies it ----

my $machine = (POSIX::uname())[4];
my ($nr_prctl, $nr_mprotect) = @{ { x86_64 => [ 157, 10 ], aarch64 => [ 167, 226 ] }->{$machine} // die $machine };
my ($prot_write, $prot_exec) = (2, 4);

# Runs a command for which mprotect() with this protection fails.
sub without_mprotect
{
	my ($protection, @command) = @_;
	my ($load, $jump_equal, $jump_set, $return) = (0x20, 0x15, 0x45, 0x06);
	my ($errno, $allow, $eperm) = (0x00050000, 0x7fff0000, 1);
	my $filter = join '', map { pack 'S C C L', @$_ } (
		[ $load, 0, 0, 0 ], [ $jump_equal, 0, 3, $nr_mprotect ],    # the call's number
		[ $load, 0, 0, 32 ], [ $jump_set, 0, 1, $protection ],      # its third argument
		[ $return, 0, 0, $errno | $eperm ], [ $return, 0, 0, $allow ]);
	my $program = pack 'S x6 P', length($filter) / 8, $filter;
	my ($no_new_privileges, $set_seccomp, $filter_mode) = (38, 22, 2);
	syscall($nr_prctl, $no_new_privileges, 1, 0, 0, 0) == 0 or die "no_new_privs: $!";
	syscall($nr_prctl, $set_seccomp, $filter_mode, $program, 0, 0) == 0 or die "seccomp: $!";
	exec(@command);
}

is_stock($node, 'no new code', qr/does not allow generated code to be made executable: Operation not permitted/,
	around => sub { without_mprotect($prot_exec, @_) });
$node->stop;
is_stock($node, 'no change of code', qr/does not allow function LWLock\w+ to be changed: Operation not permitted/,
	around => sub { without_mprotect($prot_write, @_) });
$node->stop;

# ---- /proc ----

# Runs a command as this user where /proc is what the shell commands make of it.
sub with_proc
{
	my ($shell, @command) = @_;
	my $as_user = 'my ($uid, $gid, @command) = @ARGV; ($(, $)) = ($gid, "$gid $gid"); ($<, $>) = ($uid, $uid); exec @command';
	my ($exit) = as_root('unshare', '--mount', '--propagation', 'private', 'sh', '-c',
		"mount -t tmpfs -o mode=755 none /proc && cd /proc && $shell && exec \"\$@\"", 'sh',
		'perl', '-e', $as_user, $< + 0, $( + 0, @command);
	POSIX::_exit($exit);
}

SKIP:
{
	my $why_not = why_no_root()
	  // ((as_root('unshare', '--mount', 'mount', '-t', 'tmpfs', 'none', '/proc'))[0] ? 'this system lets no file system be mounted' : undef);
	skip $why_not, 10 if $why_not;
	is_stock($node, 'no /proc', qr{cannot count the threads of this process: /proc/self/task: No such file},
		around => sub { with_proc('true', @_) });
	$node->stop;
	is_stock($node, 'unreadable maps', qr{cannot be located: /proc/self/maps: Permission denied},
		around => sub { with_proc('mkdir -p self/task/1 && touch self/maps && chmod 0 self/maps', @_) });
	$node->stop;
}

# ---- another module ----

SKIP:
{
	skip 'the other module is written for x86-64', 15 if $machine ne 'x86_64';
	my $rival = PostgreSQL::Test::Utils::tempdir() . '/rival.so';
	my ($source) = grep { -e } map { "$_/rival.c" } @INC;
	my $built = `cc -O2 -shared -fPIC -I'@{[ $node->config_data('--includedir-server') ]}' -o $rival $source 2>&1`;
	is($built, '', 'the other module is built');
	my $calls = "CREATE FUNCTION rival_calls() RETURNS bigint LANGUAGE C AS '$rival'";
	my $leave = "CREATE FUNCTION rival_leave() RETURNS void LANGUAGE C AS '$rival'";

	is_stock($node, 'another module first', qr/function LWLockAcquire was already changed by another module: e9/,
		preload => "$rival,lock_generator,adaptive_lwlock");
	cmp_ok($node->safe_psql('postgres', "$calls; SELECT rival_calls()"), '>', 1000, 'another module first: it does its work');
	$node->stop;

	my $preload = "lock_generator,adaptive_lwlock,$rival";
	is_active($node, 'another module later', preload => $preload);
	cmp_ok($node->safe_psql('postgres', 'SELECT rival_calls()'), '>', 1000, 'another module later: it does its work');
	cmp_ok(counters($node, 'lock_generator')->{contended}, '>', 0, 'another module later: and so does this one');

	# The postmaster sets shared memory up again, now with both in place.
	my $log = -s $node->logfile;
	kill 'KILL', start_session($node, 'SELECT pg_sleep(60)')->{pid};
	$node->wait_for_log(qr/all server processes terminated; reinitializing/, $log);
	comes_back($node) or die 'the server does not come back';
	is(status($node, 'active'), 't', 'another module later: active again after a crash');
	run_load($node, 'another module later: works after a crash', clients => 4, seconds => 1, sql => 'SELECT lock_generator_run(200, 200)');

	# It leaves, in one process.
	is($node->safe_psql('postgres', "$leave; SELECT rival_leave(); SELECT lock_generator_run(200, 200) > 0; SELECT rival_calls() = rival_calls()"),
		"\nt\nt", 'another module later: it leaves, and locks are taken as before');
	$node->stop;
}

is_active($node, 'none of this');
$node->stop;
done_testing();
