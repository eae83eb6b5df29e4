package MachineUse;

# Who used the machine's CPUs and disks during a time, in words: a load that stalls may have been kept from running by others.

use strict;
use warnings;
use Exporter 'import';
use POSIX qw(sysconf _SC_CLK_TCK);
use Time::HiRes qw(time);

our @EXPORT = qw(machine_use machine_use_since);

# The machine's /proc, with the processes of all pid namespaces (scripts/private-bpffs).
my $proc = $ENV{MACHINE_PROC} // '/proc';
my $ticks = sysconf(_SC_CLK_TCK);

# What the file says; nothing when it is gone.
sub text
{
	my ($file) = @_;
	open my $handle, '<', $file or return '';
	local $/;
	return <$handle> // '';
}

# Process id => [when it began, CPU seconds, name], of all that can be seen there.
sub processes
{
	my ($where) = @_;
	my %processes;
	for my $file (glob "$where/[0-9]*/stat")
	{
		my ($pid, $name, $rest) = text($file) =~ /^(\d+) \((.*)\) (.*)$/s or next;
		my @fields = split / /, $rest;
		$processes{$pid} = [ $fields[19], ($fields[11] + $fields[12]) / $ticks, $name ];
	}
	return \%processes;
}

# Where things stand now.
sub machine_use
{
	my %now = (time => time, processes => processes($proc));
	my $stat = text("$proc/stat");
	$now{cpus} = () = $stat =~ /^cpu\d/mg;
	my ($user, $nice, $system, $idle, $iowait, $irq, $softirq, $steal) = map { $_ / $ticks } $stat =~ /^cpu +(.*)/ ? split / /, $1 : (0) x 8;
	@now{qw(busy idle stolen)} = ($user + $nice + $system + $irq + $softirq, $idle + $iowait, $steal);
	for my $what (qw(cpu io memory))
	{
		my $pressure = text("$proc/pressure/$what");
		$now{pressure}{"$what ($1)"} = $2 / 1e6 while $pressure =~ /^(some|full) .*total=(\d+)/mg;
	}
	for (split /\n/, text("$proc/diskstats"))
	{
		my (undef, undef, $name, @count) = split;
		# Writes, MB written, seconds busy, flushes and the seconds that they took.
		$now{disks}{$name} = [ $count[4], $count[6] * 512 / 1e6, $count[9] / 1e3, $count[15] // 0, ($count[16] // 0) / 1e3 ] if $count[4];
	}
	return \%now;
}

# What happened since then, some lines.
sub machine_use_since
{
	my ($then) = @_;
	my $now = machine_use();
	my $seconds = $now->{time} - $then->{time};
	# A process here is known by when it began, whatever its number elsewhere.
	my %own = map { ("$_->[0] $_->[2]" => 1) } values %{ processes('/proc') };
	my %used;
	while (my ($pid, $process) = each %{ $now->{processes} })
	{
		my ($began, $cpu, $name) = @$process;
		my $before = $then->{processes}{$pid};
		$cpu -= $before->[1] if $before && $before->[0] eq $began;
		my $whose = $proc eq '/proc' ? 'all' : $own{"$began $name"} ? 'this test' : 'others';
		$used{$whose}{$name} += $cpu / $seconds;
	}
	my $known = 0;
	$known += $_ for map { values %$_ } values %used;
	my @said = sprintf 'meanwhile, in %.1f s on %d CPUs: idle %.2f CPUs, taken by the host %.2f, by what has ended and by interrupts %.2f', $seconds,
	  $now->{cpus}, (map { ($now->{$_} - $then->{$_}) / $seconds } qw(idle stolen)), ($now->{busy} - $then->{busy}) / $seconds - $known;
	for my $whose (sort keys %used)
	{
		my $by = $used{$whose};
		my @busy = grep { $by->{$_} >= 0.005 } sort { $by->{$b} <=> $by->{$a} || $a cmp $b } keys %$by;
		splice @busy, 8 if @busy > 8;
		push @said, "CPUs of $whose: " . (join(', ', map { sprintf '%s %.2f', $_, $by->{$_} } @busy) || 'none');
	}
	push @said, 'some or all tasks waited for: ' . join ', ',
	  map { sprintf '%s %.0f %%', $_, 100 * ($now->{pressure}{$_} - $then->{pressure}{$_}) / $seconds } sort keys %{ $now->{pressure} }
	  if $now->{pressure};
	for my $name (sort keys %{ $now->{disks} })
	{
		my @count = map { $now->{disks}{$name}[$_] - ($then->{disks}{$name}[$_] // 0) } 0 .. 4;
		push @said, sprintf 'disk %s: %d writes, %.1f MB, busy %.1f s; %d flushes, %.1f s', $name, @count if $count[0] || $count[3];
	}
	return join "\n", @said;
}

1;
