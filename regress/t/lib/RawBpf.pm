package RawBpf;

# For tests that tamper with the kernel side of the mirror: bpf(2) by raw system calls, and children that run a piece of the
# test as root (see TestServer.pm) or as who they are.

use strict;
use warnings;
use Exporter 'import';
use POSIX ();

our @EXPORT = qw(
  as_root_do as_other_do start_doing stop_doing
  bpf_open bpf_pin bpf_create_array bpf_create_hash bpf_update bpf_update_all bpf_freeze bpf_info
  bpf_by_id bpf_program_of_link bpf_attach_again bpf_register
  $MIRROR_DIR $BPF_F_MMAPABLE mirror_header random_bytes
);

our $MIRROR_DIR = '/sys/fs/bpf/schedmirror';
our $BPF_F_MMAPABLE = 1 << 10;

# ---- children ----

sub become_root
{
	$> = 0;
	($<, $>) = (0, 0);
	($(, $)) = (0, '0 0');
	return;
}

# Runs the code in a child after `become`. Returns what the code returned, as text, or dies with what it died of.
sub in_child
{
	my ($become, $code) = @_;
	my $pid = open(my $pipe, '-|') // die "fork: $!";
	if (!$pid)
	{
		my $result = eval { $become->(); $code->() };
		print STDOUT $@ ? "died: $@" : $result // '';
		STDOUT->flush;
		POSIX::_exit(0);    # not the test's END blocks
	}
	my $result = do { local $/; <$pipe> } // '';
	close $pipe;
	die $1 if $result =~ /^died: (.*)/s;
	return $result;
}

sub as_root_do { my ($code) = @_; return in_child(\&become_root, $code); }

# As another user, with that user's group and no privilege left.
sub as_other_do
{
	my ($user, $code) = @_;
	my ($uid, $gid) = (getpwnam($user))[ 2, 3 ];
	return in_child(
		sub {
			become_root();
			($(, $)) = ($gid, "$gid $gid");
			POSIX::setuid($uid);
			die "still root" if $> == 0 || $< == 0;
		},
		$code);
}

# Runs the code again and again in a child, as root or as who we are, until stop_doing() or until the test ends.
sub start_doing
{
	my ($as_root, $prepare, $code) = @_;
	pipe(my $report, my $said) || die "pipe: $!";
	pipe(my $told, my $tell) || die "pipe: $!";
	my $pid = fork() // die "fork: $!";
	if (!$pid)
	{
		close $_ for $tell, $report;
		my $rounds = 0;
		my $died = !eval {
			become_root() if $as_root;
			my $state = $prepare->();
			my $end = '';
			vec($end, fileno($told), 1) = 1;
			while (!select(my $ready = $end, undef, undef, 0.0001)) { $code->($state, $rounds++); }
			1;
		};
		print $said $died ? "died: $@" : $rounds;
		$said->flush;
		POSIX::_exit(0);
	}
	close $_ for $told, $said;
	return { pid => $pid, tell => $tell, report => $report };
}

# Returns how often the code ran.
sub stop_doing
{
	my ($doing) = @_;
	close $doing->{tell};
	my $said = do { local $/; readline $doing->{report} } // '';
	waitpid $doing->{pid}, 0;
	die "the child $said" if $said !~ /^\d+$/;
	return $said;
}

# ---- bpf(2) ----

my %bpf_number = (x86_64 => 321, aarch64 => 280);
my %command = (
	map_create => 0, map_update => 2, obj_pin => 6, obj_get => 7, prog_run => 10, prog_by_id => 13, map_by_id => 14, obj_info => 15,
	raw_tracepoint_open => 17, map_freeze => 22, map_update_batch => 26, link_by_id => 30
);

# The result, or -1 with $! set.
sub bpf
{
	my ($command, $attr) = @_;
	my $number = $bpf_number{ (POSIX::uname())[4] } // die 'the number of bpf() is not known here';
	$attr .= "\0" x (144 - length $attr);
	return syscall($number, $command{$command}, $attr, length $attr);
}

sub must { my ($what, $result) = @_; die "$what: $!\n" if $result < 0; return $result; }

# A descriptor of what is pinned there.
sub bpf_open { my ($path) = @_; return must("open $path", bpf('obj_get', pack('p', $path))); }
sub bpf_pin { my ($fd, $path) = @_; return must("pin $path", bpf('obj_pin', pack('pL', $path, $fd))); }

sub bpf_create_array
{
	my ($value_size, $elements, $flags) = @_;
	return must('create array', bpf('map_create', pack('L5', 2, 4, $value_size, $elements, $flags // $BPF_F_MMAPABLE)));
}

sub bpf_create_hash
{
	my ($key_size, $value_size, $elements) = @_;
	return must('create hash', bpf('map_create', pack('L5', 1, $key_size, $value_size, $elements, 0)));
}

sub bpf_update
{
	my ($fd, $key, $value) = @_;
	$key = pack('L', $key);
	return must('update', bpf('map_update', pack('LLPPQ', $fd, 0, $key, $value, 0)));
}

# Elements first, first + 1, … of an array at once; values: one after the other.
sub bpf_update_all
{
	my ($fd, $first, $count, $values) = @_;
	my $keys = pack('L*', $first .. $first + $count - 1);
	return must('update', bpf('map_update_batch', pack('QQPPLLQQ', 0, 0, $keys, $values, $count, $fd, 0, 0)));
}

sub bpf_freeze { my ($fd) = @_; return must('freeze', bpf('map_freeze', pack('L', $fd))); }

# The first words of the kernel's description: of a map type, id, key_size, value_size, max_entries, flags; of a link type,
# id, prog_id.
sub bpf_info
{
	my ($fd) = @_;
	my $info = "\0" x 256;
	must('info', bpf('obj_info', pack('LLP', $fd, length $info, $info)));
	return unpack('L6', $info);
}

# A descriptor of the `prog`, `map` or `link` of that number.
sub bpf_by_id { my ($kind, $id) = @_; return must("$kind $id", bpf("${kind}_by_id", pack('L', $id))); }

# The program that a pinned attachment runs, and one more attachment of it: a descriptor that holds it.
sub bpf_program_of_link { my ($path) = @_; return bpf_by_id('prog', (bpf_info(bpf_open($path)))[2]); }

sub bpf_attach_again
{
	my ($program) = @_;
	return must('attach', bpf('raw_tracepoint_open', pack('QL', 0, $program)));
}

# Registers this process for a slot; slot 0 takes its registration away.
sub bpf_register
{
	my ($program, $slot, $generation) = @_;
	my $registration = pack('LL', $slot, $generation);
	return must('register', bpf('prog_run', pack('L4Q2L4P', $program, 0, 0, 0, 0, 0, 0, 0, length $registration, 0, $registration)));
}

# ---- the mirror's layout (src/mirror/sched_slot.h) ----

sub mirror_header
{
	my (%fields) = @_;
	return pack('L4x48', $fields{magic} // 0x7363684d, $fields{version} // 2, $fields{slots}, $fields{active} // 1);
}

sub random_bytes
{
	my ($n) = @_;
	open(my $random, '<:raw', '/dev/urandom') || die "/dev/urandom: $!";
	read($random, my $bytes, $n) == $n || die "/dev/urandom: $!";
	return $bytes;
}

1;
