"""What of a vCPU lies in its slot (`pvirq.engine.protocol`), where the engine's short cuts read and change it too.

Properties, and written out, for that is what mypyc makes plain calls of.
"""

from __future__ import annotations

from pvirq.engine.protocol import (
    ARCHITECTURAL_IOPL,
    IOPL,
    KERNEL_ROOT,
    KERNEL_SP,
    KERNEL_SS,
    NMI_MASKED,
    NMI_PENDING,
    OTHER_GS_BASE,
    RUNSTATE,
    RUNSTATE_AREA,
    RUNSTATE_SINCE,
    SYSCALL_ENTRY,
    SYSCALL_MASKS,
    USER_MODE,
    USER_ROOT,
    WALK_ROOT,
)


class Kept:
    """The attributes of a vCPU that are items of its slot."""

    def __init__(self, items: memoryview) -> None:
        """`items`: the slot's."""
        self.kept = items

    @property
    def user_mode(self) -> int:
        """1: the guest's user mode runs, 0: its kernel."""
        return self.kept[USER_MODE]

    @user_mode.setter
    def user_mode(self, value: int) -> None:
        self.kept[USER_MODE] = value

    @property
    def kernel_root(self) -> int:
        """The frame of the root page table."""
        return self.kept[KERNEL_ROOT]

    @kernel_root.setter
    def kernel_root(self, value: int) -> None:
        self.kept[KERNEL_ROOT] = value

    @property
    def user_root(self) -> int:
        """The frame of user mode's root page table; 0: none."""
        return self.kept[USER_ROOT]

    @user_root.setter
    def user_root(self, value: int) -> None:
        self.kept[USER_ROOT] = value

    @property
    def walk_root(self) -> int:
        """Where translations start from, as an index of 64-bit items: the kernel's root or the user's."""
        return self.kept[WALK_ROOT]

    @walk_root.setter
    def walk_root(self, value: int) -> None:
        self.kept[WALK_ROOT] = value

    @property
    def inactive_gs_base(self) -> int:
        """The GS base of the mode that isn't running."""
        return self.kept[OTHER_GS_BASE]

    @inactive_gs_base.setter
    def inactive_gs_base(self, value: int) -> None:
        self.kept[OTHER_GS_BASE] = value

    @property
    def kernel_sp(self) -> int:
        """The kernel's stack (HYPERVISOR_stack_switch)."""
        return self.kept[KERNEL_SP]

    @kernel_sp.setter
    def kernel_sp(self, value: int) -> None:
        self.kept[KERNEL_SP] = value

    @property
    def kernel_ss(self) -> int:
        """Its selector."""
        return self.kept[KERNEL_SS]

    @kernel_ss.setter
    def kernel_ss(self, value: int) -> None:
        self.kept[KERNEL_SS] = value

    @property
    def syscall_callback(self) -> int:
        """Where system calls enter the kernel; 0: nowhere."""
        return self.kept[SYSCALL_ENTRY]

    @syscall_callback.setter
    def syscall_callback(self, value: int) -> None:
        self.kept[SYSCALL_ENTRY] = value

    @property
    def syscall_masks_events(self) -> int:
        """1: with events masked."""
        return self.kept[SYSCALL_MASKS]

    @syscall_masks_events.setter
    def syscall_masks_events(self, value: int) -> None:
        self.kept[SYSCALL_MASKS] = value

    @property
    def nmi_pending(self) -> int:
        """1: an NMI is due."""
        return self.kept[NMI_PENDING]

    @nmi_pending.setter
    def nmi_pending(self, value: int) -> None:
        self.kept[NMI_PENDING] = value

    @property
    def nmi_masked(self) -> int:
        """1: from its delivery to the next IRET."""
        return self.kept[NMI_MASKED]

    @nmi_masked.setter
    def nmi_masked(self, value: int) -> None:
        self.kept[NMI_MASKED] = value

    @property
    def iopl(self) -> int:
        """The IOPL that the guest believes in, as in RFLAGS."""
        return self.kept[IOPL]

    @iopl.setter
    def iopl(self, value: int) -> None:
        self.kept[IOPL] = value

    @property
    def architectural_iopl(self) -> int:
        """VMASST_TYPE_architectural_iopl."""
        return self.kept[ARCHITECTURAL_IOPL]

    @architectural_iopl.setter
    def architectural_iopl(self, value: int) -> None:
        self.kept[ARCHITECTURAL_IOPL] = value

    @property
    def runstate_area(self) -> int:
        """The guest address of its struct vcpu_runstate_info; 0: none."""
        return self.kept[RUNSTATE_AREA]

    @runstate_area.setter
    def runstate_area(self, value: int) -> None:
        self.kept[RUNSTATE_AREA] = value

    @property
    def runstate(self) -> int:
        """RUNSTATE_*."""
        return self.kept[RUNSTATE]

    @runstate.setter
    def runstate(self, value: int) -> None:
        self.kept[RUNSTATE] = value

    @property
    def runstate_since(self) -> int:
        """ns since which it is in that."""
        return self.kept[RUNSTATE_SINCE]

    @runstate_since.setter
    def runstate_since(self, value: int) -> None:
        self.kept[RUNSTATE_SINCE] = value
