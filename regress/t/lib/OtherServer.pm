package OtherServer;

# Runs a node's server in another way: from a changed copy of the program, with other modules, where the kernel denies things.

use strict;
use warnings;
use Exporter 'import';
use File::Copy qw(copy);
use File::Path qw(make_path);
use PostgreSQL::Test::Utils;
use POSIX ();
use Test::More;
use TestServer;

our @EXPORT = qw(start_as is_stock is_active copy_server);

# Starts the node. Options: preload, as the setting; bindir, where its programs are; around, called with the command that
# starts it and in a process of its own.
sub start_as
{
	my ($node, %options) = @_;
	$node->append_conf('postgresql.conf',
		"shared_preload_libraries = '" . ($options{preload} // 'lock_generator,adaptive_lwlock') . "'");
	my $around = $options{around} // sub { exec(@_); };
	my @command = (
		($options{bindir} // $node->config_data('--bindir')) . '/pg_ctl',
		'-w', '-s', '-D', $node->data_dir, '-l', $node->logfile, 'start');
	my $pid = fork() // die "fork: $!";
	if (!$pid)
	{
		delete $ENV{PGAPPNAME};
		$around->(@command);
		POSIX::_exit(127);
	}
	waitpid $pid, 0;
	die 'the server does not start: ' . slurp_file($node->logfile) if $? != 0;
	$node->_update_pid(1);
	return;
}

# Starts the node, and checks that the module is not active in it, says why, and that the server works under load.
sub is_stock
{
	my ($node, $name, $why, %options) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $log = -s $node->logfile;
	start_as($node, %options);
	is(status($node, 'active, functions_replaced'), 'f|0', "$name: the server is stock");
	my $reason = status($node, 'reason');
	like($reason, $why, "$name: the status says why");
	like(slurp_file($node->logfile, $log), qr/WARNING: .*adaptive_lwlock is not active.*\n.*DETAIL: .*\Q$reason\E/,
		"$name: the log as well");
	works($node, $name, $log);
	return;
}

# Starts the node, and checks that the module is active and the server works under load.
sub is_active
{
	my ($node, $name, %options) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $log = -s $node->logfile;
	start_as($node, %options);
	is(status($node, 'active, reason'), 't|', "$name: the module is active");
	works($node, $name, $log);
	return;
}

sub works
{
	my ($node, $name, $log) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	run_load($node, "$name: the server works", clients => 6, seconds => 1,
		sql => "SELECT lock_generator_run(200, 200, 1, 20); SELECT txid_current(), count(*) FROM pg_class");
	unlike(slurp_file($node->logfile, $log), qr/PANIC|TRAP|was terminated by signal|is not held/, "$name: no process crashed");
	return;
}

# A copy of the server's program, with the rest of the installation as it is. Returns its bin directory, where the copy is
# "postgres".
sub copy_server
{
	my ($node) = @_;
	my $bindir = $node->config_data('--bindir');
	my ($prefix, $below) = $bindir =~ m{^(.*)/((?:lib/postgresql/[^/]+/)?bin)$} or die "unknown layout: $bindir";
	my $copy = PostgreSQL::Test::Utils::tempdir();
	make_path("$copy/$below");
	for my $program ('postgres', 'pg_ctl')
	{
		copy("$bindir/$program", "$copy/$below/$program") or die "$program: $!";
		chmod 0755, "$copy/$below/$program";
	}
	symlink("$prefix/share", "$copy/share") or die "share: $!";
	my $lib = $below =~ s{bin$}{lib}r;
	symlink("$prefix/$lib", "$copy/$lib") or die "$lib: $!";
	return "$copy/$below";
}

1;
