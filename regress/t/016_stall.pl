# A load that stalls fails, and says who used the CPUs and the disk meanwhile: the fault may be theirs.

use strict;
use warnings;
use IPC::Run;
use MachineUse;
use PostgreSQL::Test::Utils;
use TestServer;
use Test::More;
use Throughput;

# What it says when a load fails that printed this.
sub words_about
{
	my ($check, $printed) = @_;
	my %load = (out => '', started => time, seconds => 0, since => machine_use());
	$load{run} = IPC::Run::start([ 'sh', '-c', 'printf "$0"; exec sleep 2', $printed ], '<', \undef, '>&', \$load{out});
	$load{run}->pump until length $load{out};
	# Ended below; the limit is for a test that dies before.
	my $busy = fork // die;
	exec('timeout', '60', 'perl', '-e', '1 while 1') if !$busy;
	sleep 1;
	IPC::Run::run([ 'dd', 'if=/dev/zero', 'of=' . PostgreSQL::Test::Utils::tempdir() . '/written', 'bs=1M', 'count=20', 'conv=fsync' ], '2>', \my $ignored);
	my $words = '';
	my $builder = Test::More->builder;
	$builder->$_(\$words) for qw(output failure_output todo_output);
	my $number = $builder->current_test;
	{
		local our $TODO = 'it is to fail';
		$check->(\%load, 'a load');
	}
	$builder->reset_outputs;
	$builder->current_test($number);
	kill 'TERM', $busy;
	waitpid $busy, 0;
	return $words;
}

my ($none, $some) = ("progress: 2.0 s, 0.0 tps, lat 0\n", "progress: 2.0 s, 0.5 tps, lat 1\n");
ok(!stalled($_->[1]), "no stall: $_->[0]") for [ nothing => '' ], [ 'all the time work' => $some x 3 ], [ 'connects at first' => $none x 2 . $some x 2 ];
ok(stalled($_->[1]), "a stall: $_->[0]") for [ 'no work' => $none ], [ 'between work' => "$some$none$some" ], [ 'at the end' => "$some$none" ];

for my $case (
	[ 'of limited time', \&finish_load, 'progress: 2.0 s, 0.0 tps\nnumber of transactions actually processed: 1\n' ],
	[ 'without end', \&end_load, 'progress: 2.0 s, 0.0 tps\n' ])
{
	my ($name, $check, $printed) = @$case;
	my $words = words_about($check, $printed);
	like($words, qr/^ *not ok .* a load/m, "a load $name: a stall is a failure");
	like($words, qr/it stalled/, 'it is called so');
	like($words, qr/meanwhile, in [\d.]+ s on \d+ CPUs: idle/, 'it says how busy the machine was');
	like($words, qr/CPUs of (all|this test): .*perl 0\.\d/, 'with what');
  SKIP:
	{
		skip 'the files are on no disk', 1 if `df --output=source @{[PostgreSQL::Test::Utils::tempdir()]}` !~ m{^/dev/}m;
		like($words, qr/disk \w+: \d+ writes/, 'and what the disk did');
	}
}
done_testing();
