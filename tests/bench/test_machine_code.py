"""Costs are read from the text of NVIDIA's tools, in the spellings of three generations."""

import json

import pytest

from trsp.bench.machine_code import Loop, MachineCode, read_machine_code

USAGE = "Resource usage:\n Function f:\n  REG:{} STACK:{} SHARED:1024 LOCAL:{} CONSTANT[0]:616\n"
SM_80 = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R8, [R8.64] ;
        /*0020*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/              @!P0 LDG.E.128 R12, [R22.64] ;
        /*0040*/              @!P0 LDG.E.128 R8, [R20.64+0x800] ;
        /*0050*/                   IADD3 R4, R21.reuse, 0x200, RZ ;
        /*0060*/                   IADD3 R5, R5.reuse, 0x400, RZ ;
        /*0070*/                   ISETP.GE.AND P1, PT, R5, c[0x0][0x194], PT ;
        /*0080*/              @!P0 STG.E.128 [R16.64], R8 ;
        /*0090*/              @!P1 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/                   STG.E [R2.64], R5 ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
        /*00e0*/                   NOP;
"""
SM_90 = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0500*/              @!P0 LDG.E.128 R12, desc[UR14][R22.64] ;
        /*0510*/              @!P0 LDG.E.U16 R8, desc[UR14][R20.64] ;
        /*0550*/                   UIADD3 UR4, UR4, 0x800, URZ ;
        /*0560*/                   UISETP.GE.AND UP0, UPT, UR4, UR7, UPT ;
        /*0930*/              @!P0 STG.E.64 desc[UR14][R16.64], R8 ;
        /*0940*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0 ;
        /*09d0*/              @!P0 BRA `(.L_x_2) ;
        /*09e0*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR14][R2.64], R5 ;
        /*0ce0*/                   EXIT ;
"""
SM_100 = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0350*/                   STL [R1], R4 ;
.L_x_2:
        /*0520*/                   LDL R3, [R1] ;
        /*05f0*/              @!P0 LDG.E.ENL2.256 R8, R12, desc[UR20][R14.64] ;
        /*0600*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR20][R24.64] ;
        /*0740*/                   UIADD3 UR4, UPT, UPT, UR4, 0x400, URZ ;
        /*0750*/                   UISETP.GE.AND UP0, UPT, UR4, UR10, UPT ;
        /*0b50*/              @!P1 STG.E.128 desc[UR20][R8.64+0x800], R16 ;
        /*0b60*/                   BRA.U !UP0, `(.L_x_2) ;
        /*0e10*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0e20*/               @P1 EXIT ;
        /*0e60*/                   STG.E desc[UR20][R2.64], R5 ;
        /*0e70*/                   EXIT ;
"""


def read(sass: str, registers: int = 40, stack: int = 0, local: int = 0) -> MachineCode:
    return read_machine_code(USAGE.format(registers, stack, local), sass)


def test_a_loop_of_sm_80() -> None:
    code = read(SM_80)
    assert code.loads == {32: 1, 128: 2}
    assert code.stores == {32: 1, 128: 1}
    # 0x200 is added to another register: a column of the same row, not the next iteration.
    assert code.loops == (Loop({128: 2}, {128: 1}, 0x400),)
    assert code.outside_loops() == ({32: 1}, {32: 1})
    assert (code.registers, code.num_barriers, code.num_instructions) == (40, 1, 14)
    assert (code.num_spills, code.num_atomics, code.uncounted) == (0, 0, ())


def test_narrow_accesses_and_an_atomic_of_sm_90() -> None:
    code = read(SM_90)
    assert code.loops == (Loop({16: 1, 128: 1}, {64: 1}, 0x800),)
    assert code.num_atomics == 1


def test_a_spill_and_256_bits_of_sm_100() -> None:
    code = read(SM_100, stack=8)
    assert code.loops == (Loop({128: 1, 256: 1}, {128: 1}, 0x400),)
    assert (code.num_spills, code.stack_bytes) == (2, 8)
    assert code.outside_loops() == ({}, {32: 1})


def test_a_cold_block_that_jumps_back_is_no_loop() -> None:
    code = read("""
        /*0000*/               @P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0010*/                   LDG.E.128 R12, desc[UR14][R22.64] ;
        /*0020*/                   EXIT ;
.L_x_9:
        /*0030*/                   MOV R1, R2 ;
        /*0040*/                   BRA `(.L_x_1) ;
""")
    assert code.loops == ()


def test_a_loop_that_hides_its_step_says_so() -> None:
    hidden = SM_90.replace("UIADD3 UR4, UR4, 0x800, URZ", "UIADD3 UR4, UR4, UR9, URZ")
    assert [loop.step for loop in read(hidden).loops] == [None]
    second = " /*0555*/ IADD3 R7, R7, 0x10, RZ ;\n /*0556*/ ISETP.GE.AND P1, PT, R7, UR8, PT ;\n"
    two = SM_90.replace("        /*0550*/", second + "        /*0550*/")
    assert [loop.step for loop in read(two).loops] == [None]


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("UBLKCP.S.G [UR4], [UR6], UR8", "UBLKCP"),
        ("LD.E.128 R4, desc[UR4][R2.64]", "LD"),
        ("UTMALDG.2D [UR8], [UR4]", "UTMALDG"),
    ],
)
def test_an_access_of_a_kind_that_is_not_counted_is_named(instruction: str, name: str) -> None:
    assert read(f" /*0000*/ {instruction} ;\n /*0010*/ EXIT ;\n").uncounted == (name,)


def test_an_asynchronous_copy_is_a_load_and_a_warp_reduction_no_atomic() -> None:
    code = read("""
        /*0000*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0010*/                   REDUX.SUM UR6, R4 ;
        /*0020*/                   ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR4][R2.64], R5 ;
        /*0030*/                   EXIT ;
""")
    assert code.loads == {128: 1}
    assert code.num_atomics == 1


def test_text_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="0 kernels"):
        read_machine_code("", SM_80)
    with pytest.raises(ValueError, match="no instruction"):
        read("fatal: not a cubin")
    with pytest.raises(ValueError, match="without a label"):
        read(" /*0000*/ BRA 0x500 ;\n")


def test_json_and_back() -> None:
    code = read(SM_100)
    assert MachineCode.from_document(json.loads(json.dumps(code.to_document()))) == code
