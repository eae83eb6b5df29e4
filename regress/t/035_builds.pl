# Servers that were built otherwise: with and without symbols, with a function that is too short, with copies of a function
# that only some callers use, as link-time optimization makes them. Each is the installed server with its program changed.
use strict;
use warnings;
use TestServer;
use OtherServer;
use PostgreSQL::Test::Utils;
use Test::More;
use POSIX ();

plan skip_all => 'the changes are written for x86-64' if (POSIX::uname())[4] ne 'x86_64';
mirror('load') unless why_no_bpf();
my $node = new_server('builds', conf => "fsync = off\n");
$node->stop;
my $installed = $node->config_data('--bindir') . '/postgres';

# ---- the program's file ----

# name => { address, size, index } of its dynamic symbols; section => { address, offset }.
my (%symbol, %section);
for (split /\n/, `LC_ALL=C readelf --dyn-syms -W $installed`)
{
	my ($index, $address, $size, $name) = /^\s*(\d+): ([0-9a-f]+)\s+(\d+) FUNC .* (\w+)/ or next;
	$symbol{$name} = { index => $index, address => hex $address, size => $size };
}
for (split /\n/, `LC_ALL=C readelf -SW $installed`)
{
	my ($name, $address, $offset) = /^\s*\[ *\d+\] (\S+) +\S+ +([0-9a-f]+) ([0-9a-f]+)/ or next;
	$section{$name} = { address => hex $address, offset => hex $offset };
}

sub offset_of { return $_[0] - $section{'.text'}{address} + $section{'.text'}{offset}; }

# A bin directory with a program that `change` has changed, given its bytes by reference.
sub changed
{
	my ($change) = @_;
	my $bindir = copy_server($node);
	open(my $file, '+<:raw', "$bindir/postgres") or die $!;
	local $/;
	my $bytes = <$file>;
	$change->(\$bytes);
	seek $file, 0, 0;
	print $file $bytes;
	close $file or die $!;
	return $bindir;
}

# Gives a symbol another address and size, undef: as it was.
sub move_symbol
{
	my ($bytes, $name, $address, $size) = @_;
	my $entry = $section{'.dynsym'}{offset} + 24 * $symbol{$name}{index};
	substr($$bytes, $entry + 8, 8) = pack 'Q<', $address if defined $address;
	substr($$bytes, $entry + 16, 8) = pack 'Q<', $size;
	return;
}

# Makes the calls of one function in another go elsewhere. Returns how many there are.
sub redirect_calls
{
	my ($bytes, $caller, $callee, $to) = @_;
	my $calls = 0;
	for my $at ($symbol{$caller}{address} .. $symbol{$caller}{address} + $symbol{$caller}{size} - 5)
	{
		my ($opcode, $distance) = unpack 'C l<', substr($$bytes, offset_of($at), 5);
		next unless $opcode == 0xe8 && $at + 5 + $distance == $symbol{$callee}{address};
		substr($$bytes, offset_of($at) + 1, 4) = pack 'l<', $to - ($at + 5);
		$calls++;
	}
	return $calls;
}

# ---- symbols ----

my $stripped = copy_server($node);
command_ok([ 'strip', '--strip-all', '-R', '.note.stapsdt', '-R', '.gnu_debuglink', "$stripped/postgres" ], 'the program is stripped');
is_active($node, 'stripped', bindir => $stripped);
$node->stop;

# Debian's server has none; these come with names and addresses as a linker gives them.
my $with_symbols = copy_server($node);
my @named = map { "--add-symbol=$_=.text:" . ($symbol{$_}{address} - $section{'.text'}{address}) . ',function,global' } sort keys %symbol;
command_ok([ 'objcopy', @named, "$with_symbols/postgres" ], 'the program gets a symbol table');
like(`readelf -sW $with_symbols/postgres`, qr/'\.symtab'.*\bLWLockAcquire$/ms, 'which names the functions');
is_active($node, 'not stripped', bindir => $with_symbols);
$node->stop;

# ---- functions ----

is_stock($node, 'too short', qr{function LWLockRelease is too short to be replaced: 5 bytes},
	bindir => changed(sub { move_symbol($_[0], 'LWLockRelease', undef, 5); }));
$node->stop;

# As compilers make them of some versions, and then they stay: they do right beside the replacements.
is_active($node, 'two that may be too short',
	bindir => changed(sub { move_symbol($_[0], $_, undef, 5) for grep { $symbol{$_} } 'LWLockReleaseClearVar', 'LWLockReleaseDisowned'; }));
is(status($node, 'functions_replaced'), $symbol{LWLockDisown} ? 12 : 11, 'two that may be too short: they were left alone');
run_load($node, 'two that may be too short: WAL', clients => 8, seconds => 2,
	sql => "SELECT pg_logical_emit_message(true, 'test', repeat('x', 2000))");
$node->stop;

# Two copies of LWLockAcquire: the symbol's, which the code that this module looks at first calls, and the one for all
# others. The symbol's is a jump to the other, in the place of a function that nobody calls.
my $calls;
is_stock($node, 'a copy of a function', qr/the program has a copy of a function to be replaced, at 0x/,
	bindir => changed(sub {
		my ($bytes) = @_;
		my $copy = $symbol{poly_contain_pt}{address} + 16;
		my $push_pop_jump = "\x55\x5d\xe9" . pack 'l<', $symbol{LWLockAcquire}{address} - ($copy + 7);
		substr($$bytes, offset_of($copy), length $push_pop_jump) = $push_pop_jump;
		$calls = redirect_calls($bytes, 'ShmemInitStruct', 'LWLockAcquire', $copy);
		move_symbol($bytes, 'LWLockAcquire', $copy, length $push_pop_jump);
	}));
is($calls, 1, 'a copy of a function: one caller uses the symbol');
$node->stop;

# It says so itself.
my $flags;
is_stock($node, 'link-time optimization', qr/the server was built with link-time optimization/,
	bindir => changed(sub { $flags = ${ $_[0] } =~ s/-Wmissing-prototypes/-flto=auto          /g; }));
ok($flags, 'link-time optimization: the flags were found');
$node->stop;

# Callers that do not come by the functions at all: here the call goes to a function that does nothing.
my $returns = $symbol{InitLWLockAccess}{address};
is_stock($node, 'inlined functions', qr/the server does not call its LWLock functions where this module replaced them/,
	bindir => changed(sub {
		my ($bytes) = @_;
		die 'not a return' unless substr($$bytes, offset_of($returns), 5) =~ /^(?:\xf3\x0f\x1e\xfa)?\xc3/;
		$calls = redirect_calls($bytes, 'ShmemInitStruct', 'LWLockAcquire', $returns);
		redirect_calls($bytes, 'ShmemInitStruct', 'LWLockRelease', $returns);
	}));
is($calls, 1, 'inlined functions: one caller');
$node->stop;

# ---- a minor release that has changed what the module was built for ----

# A flag that stock servers do not look at is set in every new lock.
is_stock($node, 'another LWLock', qr/this server differs from the one that the module was built for \(.*\) in LWLock.state: build/,
	bindir => changed(sub {
		my ($bytes) = @_;
		my ($at, $size) = (offset_of($symbol{LWLockInitialize}{address}), $symbol{LWLockInitialize}{size});
		my $code = substr $$bytes, $at, $size;
		$code =~ s/\0\0\0\x20/\0\0\0\x22/ || $code =~ s/\0\0\0\x40/\0\0\0\x44/ || die 'no flags in LWLockInitialize';
		substr($$bytes, $at, $size) = $code;
	}));
$node->stop;

# The module, with what it believes of the server's processes taken from a changed header. Returns it as a setting.
my ($build) = ($ENV{SCHEDMIRROR} // '') =~ m{^(.*)/build/schedmirror$};
my $headers = $node->config_data('--includedir-server');
sub built_for
{
	my ($change) = @_;
	my $tree = PostgreSQL::Test::Utils::tempdir();
	my $header = 'storage/proc.h';
	my $changed = slurp_file("$headers/$header");
	$change->() or die "$header is not as expected" for $changed;
	mkdir "$tree/changed" or die $!;
	mkdir "$tree/changed/storage" or die $!;
	append_to_file("$tree/changed/$header", $changed);
	my $includes = "-I$tree/changed -I. -iquote extension -Isrc -isystem $headers";
	my ($status, $output) = as_root('sh', '-ec', <<"SH");
cd $build
mkdir $tree/build
cp -a Makefile build.mk extension src sql adaptive_lwlock.control $tree
cp -a build/libadaptive.a build/src $tree/build
cd $tree
touch extension/server_layout.cpp
make -s SCHEDMIRROR=no PG_CPPFLAGS='$includes' adaptive_lwlock.so
chmod -R a+rX .
SH
	is("$status $output", '0 ', "$header: the module is built");
	return "lock_generator,$tree/adaptive_lwlock.so";
}

SKIP:
{
	my $why = why_no_root() // ($build ? undef : 'the tree is not known');
	skip $why, 1 if $why;
	my $member = sub { my ($name) = @_; return qr/^\t\S[^\n]*\b\Q$name\E;/m; };
	my ($first, $middle, $other) = map { $member->($_) } 'links', 'isBackgroundWorker', 'fpLockBits';
	for my $case (
		[ 'a member more', sub { s/^(struct PGPROC\n.*?)(?=^\};)/$1\tuint64 added;\n/ms }, 'the size of PGPROC' ],
		[ 'another in front', sub { s/(?=$first)/\tuint64 added;\n/ && s/$other// }, 'PGPROC.sem' ],
		[ 'another in the middle', sub { s/(?=$middle)/\tuint32 added[2];\n/ && s/$other// }, 'PGPROC.myProcLocks' ])
	{
		my ($name, $change, $what) = @$case;
		is_stock($node, $name, qr/this server differs from the one that the module was built for \(.*\) in $what: build the module anew/, preload => built_for($change));
		$node->stop;
	}
}
done_testing();
