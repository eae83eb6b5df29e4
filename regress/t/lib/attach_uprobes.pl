# Attaches a uprobe and a uretprobe to every named function of an executable, reads what they counted, and takes them off, again
# and again. As root.
#
#   perl attach_uprobes.pl EXECUTABLE LEAST MOST SECONDS FUNCTION=OFFSET…
#
# MOST times, or as often as there is time for in so many seconds, but LEAST times anyway. (Taking one probe off makes the
# kernel wait for all CPUs, for 5 to 100 ms.) Prints the number of rounds and "FUNCTION ENTRIES RETURNS" for each function,
# added up over all rounds. By perf_event_open(2), for tracers take a second to start.
use strict;
use warnings;
use POSIX ();
use Time::HiRes qw(time sleep);

my ($executable, $least, $most, $seconds, @functions) = @ARGV;
my %number = (x86_64 => 298, aarch64 => 241);
my $perf_event_open = $number{ (POSIX::uname())[4] } // die 'the number of perf_event_open() is not known here';

open(my $file, '<', '/sys/bus/event_source/devices/uprobe/type') or die "uprobes: $!";
my $uprobe = <$file> + 0;
open($file, '<', '/sys/devices/system/cpu/online') or die "CPUs: $!";
my @cpus = map { /(\d+)-(\d+)/ ? ($1 .. $2) : $_ + 0 } split /,/, <$file>;
my $path = "$executable\0";

# Of every process, on one CPU. The fields of perf_event_attr up to config2, version 0 of its size is 64, 112 has them all.
sub attach
{
	my ($offset, $is_return, $cpu) = @_;
	my $attr = pack('LLQQQQQLLPQ', $uprobe, 112, $is_return, 0, 0, 0, 0, 0, 0, $path, $offset);
	$attr .= "\0" x (112 - length $attr);
	my $fd = syscall($perf_event_open, $attr, -1, $cpu, -1, 8);    # PERF_FLAG_FD_CLOEXEC
	die sprintf "perf_event_open at 0x%x: $!\n", $offset if $fd < 0;
	return $fd;
}

# Each round counts on one CPU, in turn.
my ($round, %count) = (0);
for (my $start = time; $round < $most && ($round < $least || time < $start + $seconds); $round++)
{
	my @attached;
	for my $function (@functions)
	{
		my ($name, $offset) = split /=/, $function;
		for my $is_return (0, 1) { push @attached, [ "$name $is_return", attach(hex $offset, $is_return, $cpus[ $round % @cpus ]) ]; }
	}
	sleep 0.05;
	for (@attached)
	{
		my ($what, $fd) = @$_;
		POSIX::read($fd, my $value, 8) == 8 or die "read: $!";
		$count{$what} += unpack('Q', $value);
		POSIX::close($fd);
	}
}
print "$round rounds\n";
for my $function (@functions)
{
	my ($name) = split /=/, $function;
	print join(' ', $name, $count{"$name 0"}, $count{"$name 1"}), "\n";
}
